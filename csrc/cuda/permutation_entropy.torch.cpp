// permutation_entropy and its gradient on NVIDIA GPUs: the computation is in permutation_entropy.h. float32 and float64.
#include "../kernels.h"
#include "tensors.h"

namespace psf {
namespace {

using cuda::OptionalTensor;

Tensor permutation_entropy(const Tensor& t_in, const Tensor& log_r_in, const Tensor& log_c_in,
                           const OptionalTensor& num_nodes_in, double tau) {
  Arguments in("permutation_entropy", t_in.device());
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots};
  const Tensor t = in.floats("t", t_in, {&B, &S, &N}).contiguous(), log_r = in.floats("log_r", log_r_in, {&B, &S, &N}).contiguous();
  const Tensor log_c = in.floats("log_c", log_c_in, {&B, &S, &N}).contiguous(), num_nodes = in.integers("num_nodes", num_nodes_in, {&B});
  in.temperature(tau);
  const cuda::DeviceGuard guard(t.device());
  const Tensor sums = empty({B, S}, t.options().dtype(kDouble)), out = empty({}, t.options());
  PSF_DISPATCH_FLOATING(t.scalar_type(), [&] {
    using T = scalar_t;
    const cuda::PermutationEntropy<T> p{t.const_data_ptr<T>(),
                                        log_r.const_data_ptr<T>(),
                                        log_c.const_data_ptr<T>(),
                                        cuda::pointer_or_null<int64_t>(num_nodes),
                                        B * S, S, N, static_cast<T>(tau),
                                        sums.mutable_data_ptr<double>()};
    cuda::launch_rows("permutation_entropy", p, t);
    const cudaStream_t stream = cuda::current_stream(t);
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
  const cuda::DeviceGuard guard(t.device());
  const Tensor d_t = empty_like(t), d_log_r = empty_like(t), d_log_c = empty_like(t);
  PSF_DISPATCH_FLOATING(t.scalar_type(), [&] {
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
  m.add<&permutation_entropy>("permutation_entropy");
  m.add<&permutation_entropy_backward>("permutation_entropy_backward");
}

}  // namespace psf
