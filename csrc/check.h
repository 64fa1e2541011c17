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

}  // namespace psf
