// Matrix products inside kernels. float32 uses oneDNN if torch has it and torch.backends.mkldnn enables it: it uses the widest
// vectors of any CPU, while BLAS uses half of them on some.
#pragma once
#include "../check.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace psf {

// a (M, K) times b (N, K)^T, with bias (N,) added to every row. Called below autograd.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias = std::nullopt) {
  const NoAutocast no_autocast;
  static const auto linear = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const bool float32 = a.scalar_type() == at::kFloat && a.numel() > 0 && b.numel() > 0;
  if (linear && float32 && at::hasMKLDNN() && at::globalContext().userEnabledMkldnn()) {
    torch::jit::Stack stack{a, b, bias, "none", c10::List<std::optional<at::Scalar>>(), ""};
    linear->callBoxed(&stack);
    return stack[0].toTensor();
  }
  return bias ? at::addmm(*bias, a, b.t()) : at::mm(a, b.t());
}

}  // namespace psf
