// node_identifiers and its gradient on the CPU.
#include "../kernels.h"
#include "items.h"

#include "rows.h"
#define PSF_KERNEL "node_identifiers.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using Maybe = std::optional<Tensor>;

// The axes of a call, and the graphs' offsets.
struct Axes {
  Dim B{"B"}, S{"S"}, N{"N", 0, most_slots}, D{"D"}, ends{"B + 1"}, nodes{"nodes"};
  Tensor ptr;
  const int64_t* offsets;
  Axes(Arguments& in, const Tensor& ptr_in, const Tensor& rank, const Tensor& order, const Maybe& t, const Maybe& log_r, const Maybe& log_c,
       double tau, const Tensor& weight, bool needs_t = false) {
    in.integers("rank", rank, {&B, &S, &N});
    in.integers("order", order, {&B, &S, &N});
    in.floats("weight", weight, {&N, &D});
    in.soft(t, log_r, log_c, tau, {&B, &S, &N}, needs_t);
    ends.size = B + 1;
    ptr = in.integers("ptr", ptr_in, {&ends}).contiguous();
    offsets = ptr.const_data_ptr<int64_t>();
    check_offsets(in.op, offsets, B, N);
    nodes.size = offsets[B];
  }
};

Tensor node_identifiers(const Tensor& ptr_in, const Tensor& rank_in, const Tensor& order, const Maybe& t, const Maybe& log_r,
                        const Maybe& log_c, double tau, const Tensor& weight_in, int64_t nodes) {
  Arguments in("node_identifiers");
  const Axes axes(in, ptr_in, rank_in, order, t, log_r, log_c, tau, weight_in);
  const Tensor rank = rank_in.contiguous(), weight = weight_in.contiguous();
  const int64_t B = axes.B, S = axes.S, N = axes.N, D = axes.D;
  const int64_t *offsets = axes.offsets, *ranks = rank.const_data_ptr<int64_t>();
  check_rows("node_identifiers", "rank", rank, [&](int64_t b) { return offsets[b + 1] - offsets[b]; }, [&](int64_t) { return N; });
  PSF_CHECK_VALUE(offsets[B] == nodes, "node_identifiers: ptr must end with the number of nodes ", nodes, ", got ", offsets[B]);
  const Tensor out = empty({nodes, S, D}, weight.options());
  PSF_DISPATCH_FLOATING(weight.scalar_type(), [&] {
    using T = scalar_t;
    const T* w = weight.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t u = 0; u < offsets[b + 1] - offsets[b]; ++u)
          for (int64_t s = 0; s < S; ++s)
            std::copy_n(w + ranks[(b * S + s) * N + u] * D, D, y + ((offsets[b] + u) * S + s) * D);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> node_identifiers_backward(const Tensor& d_features_in, const Tensor& ptr_in,
                                                                     const Tensor& rank, const Tensor& order_in, const Maybe& t_in, const Maybe& log_r_in,
                                                                     const Maybe& log_c_in, double tau, const Tensor& weight_in,
                                                                     bool needs_t, bool needs_weight) {
  Arguments in("node_identifiers_backward");
  Axes axes(in, ptr_in, rank, order_in, t_in, log_r_in, log_c_in, tau, weight_in, needs_t);
  const Tensor d_features = in.floats("d_features", d_features_in, {&axes.nodes, &axes.S, &axes.D}).contiguous();
  const Tensor order = order_in.contiguous(), weight = weight_in.contiguous();
  const int64_t B = axes.B, S = axes.S, N = axes.N, D = axes.D;
  const int64_t *offsets = axes.offsets, *orders = order.const_data_ptr<int64_t>();
  Tensor d_weight;
  std::array<Tensor, 3> soft, d_soft;
  PSF_DISPATCH_FLOATING(weight.scalar_type(), [&] {
    using T = scalar_t;
    const T* d = d_features.const_data_ptr<T>();
    if (needs_weight) {
      d_weight = zeros_like(weight);
      T* sum = d_weight.mutable_data_ptr<T>();
      parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {  // one thread per slot, so its sum has one order
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
      for (Tensor& x : d_soft) x = zeros_like(soft[0]);
      const Tensor turned = weight.t().contiguous();
      const T* w = turned.const_data_ptr<T>();
      int64_t most = 0;
      for (int64_t b = 0; b < B; ++b) most = std::max(most, nodes(b));
      parallel_for(0, B * S, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / S, at = i * N;
          const Soft<T> p{soft[0].const_data_ptr<T>() + at, soft[1].const_data_ptr<T>() + at, soft[2].const_data_ptr<T>() + at,
                          {d_soft[0].mutable_data_ptr<T>() + at, d_soft[1].mutable_data_ptr<T>() + at, d_soft[2].mutable_data_ptr<T>() + at},
                          T(1) / T(tau)};
          T* scratch = scratch_memory<T>(soft_scratch(N) + most * N);
          PSF_DISPATCH(identifier_gradient<T>(d + (offsets[b] * S + i % S) * D, S * D, orders + at, offsets[b + 1] - offsets[b], w, N, D, p, scratch));
        }
      });
    }
  });
  return {d_soft[0], d_soft[1], d_soft[2], d_weight};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&node_identifiers>("node_identifiers");
  m.add<&node_identifiers_backward>("node_identifiers_backward");
}

}  // namespace psf
