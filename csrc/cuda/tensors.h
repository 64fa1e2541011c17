// The CUDA ops' side of torch: the device, the stream, the workspace, and the error of a failed launch.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../check.h"
#include "kernels.h"

namespace psf::cuda {

using OptionalTensor = std::optional<Tensor>;

// Makes a device the current one for a scope.
struct DeviceGuard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit DeviceGuard(Device device) : guard(device.index) {}
};

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  PSF_CHECK(aoti_torch_get_current_cuda_stream(x.device().index, &stream) == AOTI_TORCH_SUCCESS, "probsym_fast: torch gave no stream for ", x.device());
  return static_cast<cudaStream_t>(stream);
}

template <class T> const T* pointer_or_null(const Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; }

inline void check_launch(const char* op, cudaError_t status, IntArrayRef shape) {
  if (status == cudaErrorNoKernelImageForDevice)
    PSF_CHECK(false, op, ": this build has no kernel for the GPU's architecture; build again with TORCH_CUDA_ARCH_LIST");
  PSF_CHECK(status == cudaSuccess, op, ": the kernel failed for (B, S, N) = ", shape, ": ", cudaGetErrorString(status));
}

// Launches on the current stream of the device of `like`.
template <class P> void launch_rows(const char* op, const P& p, const Tensor& like) {
  const Tensor workspace = empty({workspace_bytes(p)}, like.options().dtype(kByte));
  const cudaStream_t stream = current_stream(like);
  check_launch(op, launch(p, workspace.numel() > 0 ? workspace.mutable_data_ptr<void>() : nullptr, stream), like.sizes());
}

}  // namespace psf::cuda
