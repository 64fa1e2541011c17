// soft_permutation and its gradient on the CPU: the computation is in soft_permutation.kernel.h.
#include "../kernels.h"
#include "rows.h"
#define PSF_KERNEL "soft_permutation.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_permutation(const Tensor& scores_in, const OptionalTensor& num_nodes,
                                                                    double tau, int64_t iterations, bool normalize, bool presorted) {
  Arguments in("soft_permutation");
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor scores = in.floats("scores", scores_in, {&B, &S, &N}).contiguous();
  const NumNodes counts(in, num_nodes, B, N);
  in.temperature(tau);
  in.count("iterations", iterations, 0, most_iterations);
  const Tensor order = empty({B, S, N}, scores.options().dtype(kLong)), rank = empty_like(order);
  const Tensor t = empty_like(scores), log_r = empty_like(scores), log_c = empty_like(scores);
  std::atomic<bool> finite{true};
  PSF_DISPATCH_FLOATING(scores.scalar_type(), [&] {
    using T = scalar_t;
    for_each_tile<T>(
        B, S, N, counts, [](int64_t slots) { return baseline::soft_permutation_scratch(slots); },
        [&](const Tile<T>& tile, int64_t first, T* scratch) {
          const int64_t at = first * N;
          bool ok = true;
          PSF_DISPATCH(soft_permutation_lanes<T>(
              tile, scores.const_data_ptr<T>() + at, static_cast<T>(tau), static_cast<int>(iterations), normalize, presorted, scratch,
              order.mutable_data_ptr<int64_t>() + at, rank.mutable_data_ptr<int64_t>() + at, t.mutable_data_ptr<T>() + at,
              log_r.mutable_data_ptr<T>() + at, log_c.mutable_data_ptr<T>() + at, &ok));
          if (!ok) finite = false;
        });
  });
  PSF_CHECK_VALUE(finite, "soft_permutation: scores must be finite, got NaN or infinity among the valid nodes");
  return {t, log_r, log_c, order, rank};
}

Tensor soft_permutation_backward(const OptionalTensor& d_t_in, const OptionalTensor& d_log_r_in, const OptionalTensor& d_log_c_in,
                                 const Tensor& scores_in, const Tensor& order_in, const Tensor& t_in, const OptionalTensor& num_nodes,
                                 double tau, int64_t iterations, bool normalize) {
  Arguments in("soft_permutation_backward");
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor scores = in.floats("scores", scores_in, {&B, &S, &N}).contiguous(), d_scores = empty_like(scores);
  const auto or_zeros = [&](const char* name, const OptionalTensor& x) {
    return x ? in.floats(name, x, {&B, &S, &N}) : zeros_like(scores);
  };
  const Tensor order = in.integers("order", order_in, {&B, &S, &N}).contiguous(), t = in.floats("t", t_in, {&B, &S, &N}).contiguous();
  const Tensor d_t = or_zeros("d_t", d_t_in), d_log_r = or_zeros("d_log_r", d_log_r_in), d_log_c = or_zeros("d_log_c", d_log_c_in);
  const NumNodes counts(in, num_nodes, B, N);
  in.temperature(tau);
  in.count("iterations", iterations, 0, most_iterations);
  PSF_DISPATCH_FLOATING(scores.scalar_type(), [&] {
    using T = scalar_t;
    const int steps = static_cast<int>(iterations);
    for_each_tile<T>(
        B, S, N, counts, [&](int64_t slots) { return baseline::soft_permutation_backward_scratch(slots, steps); },
        [&](const Tile<T>& tile, int64_t first, T* scratch) {
          const int64_t at = first * N;
          for (int row = 0; row < tile.rows; ++row)  // writes d_scores
            check_row(in.op, "order", order.const_data_ptr<int64_t>() + at + row * N, tile.nodes[row], tile.nodes[row], (first + row) / S);
          PSF_DISPATCH(soft_permutation_backward_lanes<T>(
              tile, d_t.const_data_ptr<T>() + at, d_log_r.const_data_ptr<T>() + at, d_log_c.const_data_ptr<T>() + at,
              scores.const_data_ptr<T>() + at, order.const_data_ptr<int64_t>() + at, t.const_data_ptr<T>() + at,
              static_cast<T>(tau), steps, normalize, scratch, d_scores.mutable_data_ptr<T>() + at));
        });
  });
  return d_scores;
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&soft_permutation>("soft_permutation");
  m.add<&soft_permutation_backward>("soft_permutation_backward");
}

}  // namespace psf
