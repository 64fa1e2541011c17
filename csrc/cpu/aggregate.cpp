// aggregate on the CPU: every node sums its neighbours' rows; the gradient is the same with the edges turned round.
#include "rows.h"
#define PSF_KERNEL "aggregate.kernel.h"
#include "each_isa.h"

#include <vector>

namespace psf {
namespace {

using at::Tensor;

Tensor sum_over(const Tensor& x_in, const Tensor& edges_in, int64_t from_axis) {
  const Tensor x = x_in.contiguous(), edges = edges_in.contiguous(), out = at::empty_like(x);
  const int64_t nodes = x.size(0), E = edges.size(1), width = nodes ? x.numel() / nodes : 0;
  const int64_t *from = edges.const_data_ptr<int64_t>() + from_axis * E, *to = edges.const_data_ptr<int64_t>() + (1 - from_axis) * E;
  std::vector<int64_t> begin(nodes + 1), neighbors(E);
  for (int64_t e = 0; e < E; ++e) {
    TORCH_CHECK_VALUE(std::min(from[e], to[e]) >= 0 && std::max(from[e], to[e]) < nodes, "aggregate: edge_index must hold node numbers 0 to ",
                      nodes - 1, ", got ", edges.const_data_ptr<int64_t>()[e], " and ", edges.const_data_ptr<int64_t>()[E + e], " in column ", e);
    ++begin[to[e] + 1];
  }
  for (int64_t i = 0; i < nodes; ++i) begin[i + 1] += begin[i];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t e = 0; e < E; ++e) neighbors[next[to[e]]++] = from[e];
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "aggregate", [&] {
    using T = scalar_t;
    const T* rows = x.const_data_ptr<T>();
    T* sums = out.mutable_data_ptr<T>();
    at::parallel_for(0, nodes, 1 + 16384 / (1 + width), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        PSF_DISPATCH(sum_rows<T>(rows, neighbors.data() + begin[i], begin[i + 1] - begin[i], width, sums + i * width));
    });
  });
  return out;
}

Tensor aggregate(const Tensor& x, const Tensor& edge_index) { return sum_over(x, edge_index, 0); }
Tensor aggregate_backward(const Tensor& d_sums, const Tensor& edge_index) { return sum_over(d_sums, edge_index, 1); }

}  // namespace

TORCH_LIBRARY_IMPL(probsym_fast, CPU, m) {
  m.impl("aggregate", &aggregate);
  m.impl("aggregate_backward", &aggregate_backward);
}

}  // namespace psf
