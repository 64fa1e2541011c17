// aggregate on the CPU: every node sums its neighbours' rows; the gradient does the same with the edges reversed.
#include "../kernels.h"
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
  const int64_t graphs = ptr_in ? ptr.size(0) - 1 : 0, nodes = x.size(0) - graphs, E = edges.size(1);
  const int64_t width = x.size(0) ? x.numel() / x.size(0) : 0;
  const int64_t *from = edges.const_data_ptr<int64_t>() + from_axis * E, *to = edges.const_data_ptr<int64_t>() + (1 - from_axis) * E;
  std::vector<int64_t> begin(nodes + 1), neighbors(E), graph(nodes);
  for (int64_t e = 0; e < E; ++e) {
    PSF_CHECK_VALUE(std::min(from[e], to[e]) >= 0 && std::max(from[e], to[e]) < nodes, "aggregate: edge_index must hold node numbers 0 to ",
                      nodes - 1, ", got ", edges.const_data_ptr<int64_t>()[e], " and ", edges.const_data_ptr<int64_t>()[E + e], " in column ", e);
    ++begin[to[e] + 1];
  }
  for (int64_t i = 0; i < nodes; ++i) begin[i + 1] += begin[i];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t e = 0; e < E; ++e) neighbors[next[to[e]]++] = from[e];
  const int64_t* offsets = ptr_in ? ptr.const_data_ptr<int64_t>() : nullptr;
  if (offsets) PSF_CHECK_VALUE(offsets[0] == 0 && offsets[graphs] == nodes, "aggregate: ptr must rise from 0 to the ", nodes,
                                 " nodes, x's rows less one a graph, got ", offsets[0], " to ", offsets[graphs]);
  for (int64_t b = 0; b < graphs; ++b) {
    PSF_CHECK_VALUE(offsets[b] <= offsets[b + 1] && offsets[b + 1] <= nodes, "aggregate: ptr must rise, got ", offsets[b + 1], " after ", offsets[b]);
    std::fill(graph.begin() + offsets[b], graph.begin() + offsets[b + 1], b);
  }
  for (int64_t e = 0; offsets && e < E; ++e)
    PSF_CHECK_VALUE(graph[from[e]] == graph[to[e]], "aggregate: edge_index must join nodes of one graph, got column ", e, " from graph ",
                      graph[edges.const_data_ptr<int64_t>()[e]], " to graph ", graph[edges.const_data_ptr<int64_t>()[E + e]]);
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
          PSF_DISPATCH(add_rows<T>(rows, neighbors.data() + begin[i], begin[i + 1] - begin[i], width, sum));
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
