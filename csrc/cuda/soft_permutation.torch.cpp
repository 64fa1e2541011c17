// soft_permutation and its gradient on NVIDIA GPUs: the computation is in soft_permutation.h. float32 and float64: the
// scans cost little in either, and scores are float64 if noise breaks their ties.
#include "../kernels.h"
#include "tensors.h"

namespace psf {
namespace {

using cuda::OptionalTensor;

using Permutation = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Permutation soft_permutation(const Tensor& scores_in, const OptionalTensor& num_nodes_in, double tau, int64_t iterations,
                             bool normalize, bool presorted) {
  Arguments in("soft_permutation", scores_in.device());
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor scores = in.floats("scores", scores_in, {&B, &S, &N}).contiguous();
  const Tensor num_nodes = in.integers("num_nodes", num_nodes_in, {&B});
  in.temperature(tau);
  in.count("iterations", iterations, 0, most_iterations);
  const cuda::DeviceGuard guard(scores.device());
  const Tensor order = empty({B, S, N}, scores.options().dtype(kLong)), rank = empty_like(order);
  const Tensor t = empty_like(scores), log_r = empty_like(scores), log_c = empty_like(scores);
  PSF_DISPATCH_FLOATING(scores.scalar_type(), [&] {
    using T = scalar_t;
    const cuda::SoftPermutation<T> p{scores.const_data_ptr<T>(),
                                     cuda::pointer_or_null<int64_t>(num_nodes),
                                     B * S, S, N, static_cast<T>(tau), static_cast<int>(iterations), normalize, presorted,
                                     t.mutable_data_ptr<T>(),
                                     log_r.mutable_data_ptr<T>(),
                                     log_c.mutable_data_ptr<T>(),
                                     order.mutable_data_ptr<int64_t>(),
                                     rank.mutable_data_ptr<int64_t>()};
    cuda::launch_rows("soft_permutation", p, scores);
  });
  return {t, log_r, log_c, order, rank};
}

Tensor soft_permutation_backward(const OptionalTensor& d_t_in, const OptionalTensor& d_log_r_in,
                                 const OptionalTensor& d_log_c_in, const Tensor& scores_in, const Tensor& order_in,
                                 const Tensor& t_in, const OptionalTensor& num_nodes_in, double tau, int64_t iterations,
                                 bool normalize) {
  Arguments in("soft_permutation_backward", scores_in.device());
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor scores = in.floats("scores", scores_in, {&B, &S, &N}).contiguous(), d_scores = empty_like(scores);
  const Tensor order = in.integers("order", order_in, {&B, &S, &N}).contiguous();
  const Tensor t = in.floats("t", t_in, {&B, &S, &N}).contiguous(), d_t = in.floats("d_t", d_t_in, {&B, &S, &N});
  const Tensor d_log_r = in.floats("d_log_r", d_log_r_in, {&B, &S, &N});
  const Tensor d_log_c = in.floats("d_log_c", d_log_c_in, {&B, &S, &N}), num_nodes = in.integers("num_nodes", num_nodes_in, {&B});
  in.temperature(tau);
  in.count("iterations", iterations, 0, most_iterations);
  const cuda::DeviceGuard guard(scores.device());
  PSF_DISPATCH_FLOATING(scores.scalar_type(), [&] {
    using T = scalar_t;
    const cuda::SoftPermutationBackward<T> p{cuda::pointer_or_null<T>(d_t),
                                             cuda::pointer_or_null<T>(d_log_r),
                                             cuda::pointer_or_null<T>(d_log_c),
                                             scores.const_data_ptr<T>(),
                                             order.const_data_ptr<int64_t>(),
                                             t.const_data_ptr<T>(),
                                             cuda::pointer_or_null<int64_t>(num_nodes),
                                             B * S, S, N, static_cast<T>(tau), static_cast<int>(iterations), normalize,
                                             d_scores.mutable_data_ptr<T>()};
    cuda::launch_rows("soft_permutation_backward", p, scores);
  });
  return d_scores;
}

}  // namespace

PSF_KERNELS(CUDA, m) {
  m.add<&soft_permutation>("soft_permutation");
  m.add<&soft_permutation_backward>("soft_permutation_backward");
}

}  // namespace psf
