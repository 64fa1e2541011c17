// Matrix products inside kernels. float32 goes through oneDNN, where torch has it and has not been told otherwise
// (torch.backends.mkldnn): its code uses the widest vectors of any CPU, the BLAS's on some only half of them.
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
