// The only argument checks of the kernels. Shapes and dtypes are checked where the op is called (in Python, with
// the op's own axis names); what needs the values is checked here, while they are read anyway.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>

namespace psf {

// (B,) int64 numbers of valid nodes, or null: all N are valid.
inline const int64_t* num_nodes_pointer(const char* op, const std::optional<at::Tensor>& num_nodes, int64_t B, int64_t N) {
  if (!num_nodes.has_value()) return nullptr;
  const int64_t* counts = num_nodes->const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b)
    TORCH_CHECK_VALUE(counts[b] >= 1 && counts[b] <= N, op, ": num_nodes must be between 1 and N = ", N, ", got ",
                      counts[b], " for graph ", b);
  return counts;
}

// Products inside a kernel stay in its dtype, under torch.autocast too.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Rows (B, S, N) of slots or nodes that memory is read by: the first count(b) entries of a row must be 0 to limit(b) - 1.
template <class Count, class Limit>
void check_rows(const char* op, const char* name, const at::Tensor& x, Count count, Limit limit) {
  const int64_t *row = x.const_data_ptr<int64_t>(), B = x.size(0), S = x.size(1), N = x.size(2);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t n = count(b), end = limit(b);
    for (int64_t s = 0; s < S; ++s, row += N) {
      bool bad = false;
      for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(row[i]) >= static_cast<uint64_t>(end);
      for (int64_t i = 0; bad && i < n; ++i)
        TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < end, op, ": ", name, " must hold 0 to ", end - 1, ", got ", row[i], " for graph ", b);
    }
  }
}

}  // namespace psf
