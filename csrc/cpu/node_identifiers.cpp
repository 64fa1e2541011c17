// node_identifiers and its gradient on the CPU.
#include "items.h"

#include "rows.h"
#define PSF_KERNEL "node_identifiers.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// Node offsets of the graphs, checked.
const int64_t* offsets_of(const Tensor& ptr, int64_t B, int64_t N) {
  const int64_t* offsets = ptr.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b)
    TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[b + 1] >= offsets[b] && offsets[b + 1] - offsets[b] <= N,
                      "node_identifiers: ptr must rise from 0 by at most N = ", N, " a graph, got ", offsets[b + 1], " after ", offsets[b]);
  return offsets;
}

Tensor node_identifiers(const Tensor& ptr_in, const Tensor& rank_in, const Tensor&, const Maybe&, const Maybe&, const Maybe&, double,
                        const Tensor& weight_in, int64_t nodes) {
  const Tensor ptr = ptr_in.contiguous(), rank = rank_in.contiguous(), weight = weight_in.contiguous();
  const int64_t B = rank.size(0), S = rank.size(1), N = rank.size(2), D = weight.size(1);
  const int64_t *offsets = offsets_of(ptr, B, N), *ranks = rank.const_data_ptr<int64_t>();
  check_rows("node_identifiers", "rank", rank, [&](int64_t b) { return offsets[b + 1] - offsets[b]; }, [&](int64_t) { return N; });
  TORCH_CHECK_VALUE(offsets[B] == nodes, "node_identifiers: ptr must end with the number of nodes ", nodes, ", got ", offsets[B]);
  const Tensor out = at::empty({nodes, S, D}, weight.options());
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "node_identifiers", [&] {
    using T = scalar_t;
    const T* w = weight.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t u = 0; u < offsets[b + 1] - offsets[b]; ++u)
          for (int64_t s = 0; s < S; ++s)
            std::memcpy(y + ((offsets[b] + u) * S + s) * D, w + ranks[(b * S + s) * N + u] * D, D * sizeof(T));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> node_identifiers_backward(const Tensor& d_features_in, const Tensor& ptr_in, const Tensor&,
                                                                     const Tensor& order_in, const Maybe& t_in, const Maybe& log_r_in,
                                                                     const Maybe& log_c_in, double tau, const Tensor& weight_in,
                                                                     bool needs_t, bool needs_weight) {
  const Tensor d_features = d_features_in.contiguous(), ptr = ptr_in.contiguous(), order = order_in.contiguous(), weight = weight_in.contiguous();
  const int64_t B = order.size(0), S = order.size(1), N = order.size(2), D = weight.size(1);
  const int64_t *offsets = ptr.const_data_ptr<int64_t>(), *orders = order.const_data_ptr<int64_t>();
  Tensor d_weight;
  std::array<Tensor, 3> soft, d_soft;
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "node_identifiers_backward", [&] {
    using T = scalar_t;
    const T* d = d_features.const_data_ptr<T>();
    if (needs_weight) {
      d_weight = at::zeros_like(weight);
      T* sum = d_weight.mutable_data_ptr<T>();
      at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {  // a slot's sum has one thread and one order
        for (int64_t b = 0; b < B; ++b)
          for (int64_t s = 0; s < S; ++s)
            for (int64_t j = begin; j < end; ++j)
              if (const int64_t u = orders[(b * S + s) * N + j]; u >= 0 && u < offsets[b + 1] - offsets[b])
                PSF_DISPATCH(add_row<T>(sum + j * D, d + ((offsets[b] + u) * S + s) * D, D));
      });
    }
    if (needs_t) {
      const auto nodes = [&](int64_t b) { return offsets[b + 1] - offsets[b]; };
      check_rows("node_identifiers", "order", order, nodes, nodes);
      soft = {t_in->contiguous(), log_r_in->contiguous(), log_c_in->contiguous()};
      for (Tensor& x : d_soft) x = at::zeros_like(soft[0]);
      const T* w = weight.const_data_ptr<T>();
      at::parallel_for(0, B * S, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / S, at = i * N;
          const Soft<T> p{soft[0].const_data_ptr<T>() + at, soft[1].const_data_ptr<T>() + at, soft[2].const_data_ptr<T>() + at,
                          {d_soft[0].mutable_data_ptr<T>() + at, d_soft[1].mutable_data_ptr<T>() + at, d_soft[2].mutable_data_ptr<T>() + at},
                          T(1) / T(tau)};
          T* scratch = scratch_memory<T>(soft_scratch(N));
          PSF_DISPATCH(identifier_gradient<T>(d + (offsets[b] * S + i % S) * D, S * D, orders + at, offsets[b + 1] - offsets[b], w, D, p, scratch));
        }
      });
    }
  });
  return {d_soft[0], d_soft[1], d_soft[2], d_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(probsym_fast, CPU, m) {
  m.impl("node_identifiers", &node_identifiers);
  m.impl("node_identifiers_backward", &node_identifiers_backward);
}

}  // namespace psf
