// permutation_entropy and its gradient on the CPU: the computation is in permutation_entropy.kernel.h.
#include "../kernels.h"
#include "rows.h"
#define PSF_KERNEL "permutation_entropy.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor permutation_entropy(const Tensor& t_in, const Tensor& log_r_in, const Tensor& log_c_in, const OptionalTensor& num_nodes,
                           double tau) {
  Arguments in("permutation_entropy");
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor t = in.floats("t", t_in, {&B, &S, &N}).contiguous(), log_r = in.floats("log_r", log_r_in, {&B, &S, &N}).contiguous();
  const Tensor log_c = in.floats("log_c", log_c_in, {&B, &S, &N}).contiguous();
  const NumNodes counts(in, num_nodes, B, N);
  in.temperature(tau);
  const Tensor sums = empty({B, S}, t.options()), out = empty({}, t.options());
  PSF_DISPATCH_FLOATING(t.scalar_type(), [&] {
    using T = scalar_t;
    T* sum = sums.mutable_data_ptr<T>();
    for_each_tile<T>(
        B, S, N, counts, [](int64_t slots) { return baseline::permutation_entropy_scratch(slots); },
        [&](const Tile<T>& tile, int64_t first, T* scratch) {
          const int64_t at = first * N;
          PSF_DISPATCH(permutation_entropy_lanes<T>(tile, t.const_data_ptr<T>() + at, log_r.const_data_ptr<T>() + at,
                                                    log_c.const_data_ptr<T>() + at, static_cast<T>(tau), scratch, sum + first));
        });
    double total = B * S > 0 ? 0 : std::numeric_limits<double>::quiet_NaN();  // as the mean of nothing
    for (int64_t row = 0; row < B * S; ++row) total += double(sum[row]) / double((counts ? counts[row / S] : N) * S * B);
    *out.mutable_data_ptr<T>() = static_cast<T>(total);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> permutation_entropy_backward(const Tensor& d, const Tensor& t_in, const Tensor& log_r_in,
                                                                const Tensor& log_c_in, const OptionalTensor& num_nodes,
                                                                double tau) {
  Arguments in("permutation_entropy_backward");
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor t = in.floats("t", t_in, {&B, &S, &N}).contiguous(), log_r = in.floats("log_r", log_r_in, {&B, &S, &N}).contiguous();
  const Tensor log_c = in.floats("log_c", log_c_in, {&B, &S, &N}).contiguous();
  in.floats("d_entropy", d, {});
  const NumNodes counts(in, num_nodes, B, N);
  in.temperature(tau);
  const Tensor d_t = empty_like(t), d_log_r = empty_like(t), d_log_c = empty_like(t);
  PSF_DISPATCH_FLOATING(t.scalar_type(), [&] {
    using T = scalar_t;
    const double scale = double(*d.const_data_ptr<T>()) / double(S * B);
    for_each_tile<T>(
        B, S, N, counts, [](int64_t slots) { return baseline::permutation_entropy_scratch(slots); },
        [&](const Tile<T>& tile, int64_t first, T* scratch) {
          const int64_t at = first * N;
          T weight[Tile<T>::most_lanes];
          for (int row = 0; row < tile.rows; ++row) weight[row] = static_cast<T>(scale / double(tile.nodes[row]));
          PSF_DISPATCH(permutation_entropy_backward_lanes<T>(
              tile, weight, t.const_data_ptr<T>() + at, log_r.const_data_ptr<T>() + at, log_c.const_data_ptr<T>() + at,
              static_cast<T>(tau), scratch, d_t.mutable_data_ptr<T>() + at, d_log_r.mutable_data_ptr<T>() + at,
              d_log_c.mutable_data_ptr<T>() + at));
        });
  });
  return {d_t, d_log_r, d_log_c};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&permutation_entropy>("permutation_entropy");
  m.add<&permutation_entropy_backward>("permutation_entropy_backward");
}

}  // namespace psf
