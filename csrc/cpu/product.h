// Matrix products inside kernels. float32 uses oneDNN if torch has it and torch.backends.mkldnn enables it: it uses the widest
// vectors of any CPU, while BLAS uses half of them on some.
#pragma once
#include <dlfcn.h>

#include "../tensor.h"

// Weak: a torch without oneDNN lacks it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const char* attr, const double** scalars, int64_t scalars_len_,
    const char** algorithm, AtenTensorHandle* ret0);

namespace psf {

// torch.backends.mkldnn.enabled, which the stable ABI does not give: read where the symbols are found, else true.
inline bool wants_onednn() {
  static const auto context = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
  static const auto enabled = reinterpret_cast<bool (*)(const void*)>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context17userEnabledMkldnnEv"));
  return !context || !enabled || enabled(context());
}

// a (M, K) times b (N, K)^T, with bias (N,) added to every row. Called below autograd.
inline Tensor product(const Tensor& a, const Tensor& b, const Tensor& bias = {}) {
  if (aoti_torch_cpu__linear_pointwise && a.scalar_type() == kFloat && a.numel() > 0 && b.numel() > 0 && wants_onednn()) {
    AtenTensorHandle out = nullptr, added = bias.get();
    const char* algorithm = "";
    const AOTITorchError status =
        aoti_torch_cpu__linear_pointwise(a.get(), b.get(), bias.defined() ? &added : nullptr, "none", nullptr, 0, &algorithm, &out);
    PSF_CHECK(status == AOTI_TORCH_SUCCESS, "probsym_fast: oneDNN failed for a product of ", a.sizes(), " and ", b.sizes());
    return Tensor(out);
  }
  const Tensor out = empty({a.size(0), b.size(0)}, a.options());
  if (!bias.defined()) {
    mm_out(out, a, b.t());
    return out;
  }
  fill_rows(out, bias);
  addmm_(out, a, b.t());
  return out;
}

}  // namespace psf
