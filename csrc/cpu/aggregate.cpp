// aggregate on the CPU: every node sums its neighbours' rows; the gradient does the same with the edges reversed.
#include "../kernels.h"
#include "adjacency.h"
#include "rows.h"
#define PSF_KERNEL "aggregate.kernel.h"
#include "each_isa.h"

#include <vector>

namespace psf {
namespace {

using Maybe = std::optional<Tensor>;

constexpr int64_t part = 4096;  // values summed at a time in the gradient of `own`, for any number of threads

void check(Arguments& in, const Tensor& x, const Tensor& edge_index, const Maybe& ptr, const Maybe& own) {
  in.floats("x", x);
  PSF_CHECK_VALUE(x.dim() > 0, in.op, ": x must be (nodes, ...), got a scalar");
  Dim two{"2", 2, 2, 2}, E{"E"}, offsets{"B + 1", 1, x.size(0) + 1};
  in.integers("edge_index", edge_index, {&two, &E});
  in.integers("ptr", ptr, {&offsets});
  in.floats("own", own, {});
}

Tensor sum_over(const Tensor& x_in, const Tensor& edges_in, const Maybe& ptr_in, const Maybe& own_in, int64_t from_axis) {
  const Tensor x = x_in.contiguous(), edges = edges_in.contiguous(), ptr = ptr_in ? ptr_in->contiguous() : Tensor(), out = empty_like(x);
  const int64_t graphs = ptr_in ? ptr.size(0) - 1 : 0, nodes = x.size(0) - graphs;
  const int64_t width = x.size(0) ? x.numel() / x.size(0) : 0;
  const Adjacency edges_to("aggregate", edges, nodes, from_axis);
  const int64_t* offsets = ptr_in ? ptr.const_data_ptr<int64_t>() : nullptr;
  const std::vector<int64_t> graph = offsets ? graph_of_nodes("aggregate", offsets, graphs, nodes, edges) : std::vector<int64_t>();
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const T* rows = x.const_data_ptr<T>();
    const T own = own_in ? *own_in->const_data_ptr<T>() : T(0);
    T* sums = out.mutable_data_ptr<T>();
    parallel_for(0, x.size(0), grain(double(width)), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T* sum = sums + i * width;
        PSF_DISPATCH(start_row<T>(rows + i * width, i < nodes ? own : own + T(1), width, sum));
        if (i < nodes) {
          PSF_DISPATCH(add_rows<T>(rows, edges_to.neighbors.data() + edges_to.begin[i], edges_to.begin[i + 1] - edges_to.begin[i], width, sum));
          if (offsets) PSF_DISPATCH(add_range<T>(rows + (nodes + graph[i]) * width, 1, width, sum));
        } else {
          const int64_t b = i - nodes;
          PSF_DISPATCH(add_range<T>(rows + offsets[b] * width, offsets[b + 1] - offsets[b], width, sum));
        }
      }
    });
  });
  return out;
}

Tensor aggregate(const Tensor& x, const Tensor& edge_index, const Maybe& ptr, const Maybe& own) {
  Arguments in("aggregate");
  check(in, x, edge_index, ptr, own);
  return sum_over(x, edge_index, ptr, own, 0);
}

std::tuple<Tensor, Tensor> aggregate_backward(const Tensor& d_sums, const Tensor& x_in, const Tensor& edge_index, const Maybe& ptr,
                                              const Maybe& own, bool needs_x, bool needs_own) {
  Arguments in("aggregate_backward");
  check(in, x_in, edge_index, ptr, own);
  in.same_shape("d_sums", in.floats("d_sums", d_sums), "x", x_in);
  Tensor d_x, d_own;
  if (needs_x) d_x = sum_over(d_sums, edge_index, ptr, own, 1);
  if (needs_own) {
    const Tensor x = x_in.contiguous(), d = d_sums.contiguous();
    const int64_t parts = (x.numel() + part - 1) / part;
    PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
      using T = scalar_t;
      const T *a = x.const_data_ptr<T>(), *b = d.const_data_ptr<T>();
      std::vector<T> sums(parts);
      parallel_for(0, parts, 4, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k)
          PSF_DISPATCH(product<T>(a + k * part, b + k * part, std::min(part, x.numel() - k * part), &sums[k]));
      });
      double total = 0;
      for (const T sum : sums) total += static_cast<double>(sum);
      d_own = empty({}, x.options());
      *d_own.mutable_data_ptr<T>() = static_cast<T>(total);
    });
  }
  return {d_x, d_own};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&aggregate>("aggregate");
  m.add<&aggregate_backward>("aggregate_backward");
}

}  // namespace psf
