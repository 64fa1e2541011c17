// soft_permutation and its gradient on NVIDIA GPUs: what is computed stands in soft_permutation.h. float32 and float64: the
// scans cost little in either, and scores come in float64 where ties are broken by noise.
#include "tensors.h"

namespace psf {
namespace {

using at::Tensor;
using cuda::OptionalTensor;

using Permutation = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Permutation soft_permutation(const Tensor& scores_in, const OptionalTensor& num_nodes_in, double tau, int64_t iterations,
                             bool normalize) {
  const c10::cuda::CUDAGuard guard(scores_in.device());
  const Tensor scores = scores_in.contiguous(), num_nodes = cuda::or_undefined(num_nodes_in);
  cuda::check_device("soft_permutation", scores, {{"num_nodes", &num_nodes}});
  const int64_t B = scores.size(0), S = scores.size(1), N = scores.size(2);
  cuda::check_length("soft_permutation", N);
  const Tensor order = at::empty({B, S, N}, scores.options().dtype(at::kLong)), rank = at::empty_like(order);
  const Tensor t = at::empty_like(scores), log_r = at::empty_like(scores), log_c = at::empty_like(scores);
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "soft_permutation", [&] {
    using T = scalar_t;
    const cuda::SoftPermutation<T> p{scores.const_data_ptr<T>(),
                                     cuda::pointer_or_null<int64_t>(num_nodes),
                                     B * S, S, N, static_cast<T>(tau), static_cast<int>(iterations), normalize,
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
  const c10::cuda::CUDAGuard guard(scores_in.device());
  const Tensor d_t = cuda::or_undefined(d_t_in), d_log_r = cuda::or_undefined(d_log_r_in);
  const Tensor d_log_c = cuda::or_undefined(d_log_c_in);
  const Tensor scores = scores_in.contiguous(), order = order_in.contiguous(), t = t_in.contiguous();
  const Tensor num_nodes = cuda::or_undefined(num_nodes_in), d_scores = at::empty_like(scores);
  cuda::check_device("soft_permutation_backward", scores,
                     {{"d_t", &d_t}, {"d_log_r", &d_log_r}, {"d_log_c", &d_log_c}, {"order", &order}, {"t", &t},
                      {"num_nodes", &num_nodes}});
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "soft_permutation_backward", [&] {
    using T = scalar_t;
    const int64_t B = scores.size(0), S = scores.size(1), N = scores.size(2);
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

TORCH_LIBRARY_IMPL(probsym_fast, CUDA, m) {
  m.impl("soft_permutation", &soft_permutation);
  m.impl("soft_permutation_backward", &soft_permutation_backward);
}

}  // namespace psf
