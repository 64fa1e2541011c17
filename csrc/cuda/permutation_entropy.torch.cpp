// permutation_entropy and its gradient on NVIDIA GPUs: the computation is in permutation_entropy.h. float32 and float64.
#include "../kernels.h"
#include "tensors.h"

namespace psf {
namespace {

using at::Tensor;
using cuda::OptionalTensor;

Tensor permutation_entropy(const Tensor& t_in, const Tensor& log_r_in, const Tensor& log_c_in,
                           const OptionalTensor& num_nodes_in, double tau) {
  Arguments in("permutation_entropy", t_in.device());
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor t = in.floats("t", t_in, {&B, &S, &N}).contiguous(), log_r = in.floats("log_r", log_r_in, {&B, &S, &N}).contiguous();
  const Tensor log_c = in.floats("log_c", log_c_in, {&B, &S, &N}).contiguous(), num_nodes = in.integers("num_nodes", num_nodes_in, {&B});
  in.temperature(tau);
  const c10::cuda::CUDAGuard guard(t.device());
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
  Arguments in("permutation_entropy_backward", t_in.device());
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor t = in.floats("t", t_in, {&B, &S, &N}).contiguous(), log_r = in.floats("log_r", log_r_in, {&B, &S, &N}).contiguous();
  const Tensor log_c = in.floats("log_c", log_c_in, {&B, &S, &N}).contiguous(), num_nodes = in.integers("num_nodes", num_nodes_in, {&B});
  in.floats("d_entropy", d, {});
  in.temperature(tau);
  const c10::cuda::CUDAGuard guard(t.device());
  const Tensor d_t = at::empty_like(t), d_log_r = at::empty_like(t), d_log_c = at::empty_like(t);
  AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "permutation_entropy_backward", [&] {
    using T = scalar_t;
    const cuda::PermutationEntropyBackward<T> p{d.const_data_ptr<T>(),
                                                t.const_data_ptr<T>(),
                                                log_r.const_data_ptr<T>(),
                                                log_c.const_data_ptr<T>(),
                                                cuda::pointer_or_null<int64_t>(num_nodes),
                                                B * S, S, N, static_cast<T>(tau),
                                                d_t.mutable_data_ptr<T>(),
                                                d_log_r.mutable_data_ptr<T>(),
                                                d_log_c.mutable_data_ptr<T>()};
    cuda::launch_rows("permutation_entropy_backward", p, t);
  });
  return {d_t, d_log_r, d_log_c};
}

}  // namespace

PSF_KERNELS(CUDA, m) {
  m.impl("permutation_entropy", &permutation_entropy);
  m.impl("permutation_entropy_backward", &permutation_entropy_backward);
}

}  // namespace psf
