// permutation_entropy and its gradient on NVIDIA GPUs: what is computed stands in permutation_entropy.h. float32 and float64.
#include "tensors.h"

namespace psf {
namespace {

using at::Tensor;
using cuda::OptionalTensor;

Tensor permutation_entropy(const Tensor& t_in, const Tensor& log_r_in, const Tensor& log_c_in,
                           const OptionalTensor& num_nodes_in, double tau) {
  const c10::cuda::CUDAGuard guard(t_in.device());
  const Tensor t = t_in.contiguous(), log_r = log_r_in.contiguous(), log_c = log_c_in.contiguous();
  const Tensor num_nodes = cuda::or_undefined(num_nodes_in);
  cuda::check_device("permutation_entropy", t, {{"log_r", &log_r}, {"log_c", &log_c}, {"num_nodes", &num_nodes}});
  const int64_t B = t.size(0), S = t.size(1), N = t.size(2);
  cuda::check_length("permutation_entropy", N);
  const Tensor sums = at::empty({B, S}, t.options().dtype(at::kDouble)), out = at::empty({}, t.options());
  AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "permutation_entropy", [&] {
    using T = scalar_t;
    const cuda::PermutationEntropy<T> p{t.const_data_ptr<T>(),
                                        log_r.const_data_ptr<T>(),
                                        log_c.const_data_ptr<T>(),
                                        cuda::pointer_or_null<int64_t>(num_nodes),
                                        B * S, S, N, static_cast<T>(tau),
                                        sums.mutable_data_ptr<double>()};
    cuda::launch_rows("permutation_entropy", p, t);
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(t.get_device());
    const cudaError_t status = cuda::add_up(sums.const_data_ptr<double>(), B * S, out.mutable_data_ptr<T>(), stream);
    cuda::check_launch("permutation_entropy", status, t.sizes());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> permutation_entropy_backward(const Tensor& d, const Tensor& t_in, const Tensor& log_r_in,
                                                                const Tensor& log_c_in, const OptionalTensor& num_nodes_in,
                                                                double tau) {
  const c10::cuda::CUDAGuard guard(t_in.device());
  const Tensor t = t_in.contiguous(), log_r = log_r_in.contiguous(), log_c = log_c_in.contiguous();
  const Tensor num_nodes = cuda::or_undefined(num_nodes_in);
  cuda::check_device("permutation_entropy_backward", t,
                     {{"d_entropy", &d}, {"log_r", &log_r}, {"log_c", &log_c}, {"num_nodes", &num_nodes}});
  const Tensor d_t = at::empty_like(t), d_log_r = at::empty_like(t), d_log_c = at::empty_like(t);
  AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "permutation_entropy_backward", [&] {
    using T = scalar_t;
    const cuda::PermutationEntropyBackward<T> p{d.const_data_ptr<T>(),
                                                t.const_data_ptr<T>(),
                                                log_r.const_data_ptr<T>(),
                                                log_c.const_data_ptr<T>(),
                                                cuda::pointer_or_null<int64_t>(num_nodes),
                                                t.size(0) * t.size(1), t.size(1), t.size(2), static_cast<T>(tau),
                                                d_t.mutable_data_ptr<T>(),
                                                d_log_r.mutable_data_ptr<T>(),
                                                d_log_c.mutable_data_ptr<T>()};
    cuda::launch_rows("permutation_entropy_backward", p, t);
  });
  return {d_t, d_log_r, d_log_c};
}

}  // namespace

TORCH_LIBRARY_IMPL(probsym_fast, CUDA, m) {
  m.impl("permutation_entropy", &permutation_entropy);
  m.impl("permutation_entropy_backward", &permutation_entropy_backward);
}

}  // namespace psf
