// The CUDA ops' side of torch: the device, the stream, the workspace, and the error of a failed launch.
#pragma once
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../check.h"
#include "kernels.h"

namespace psf::cuda {

using OptionalTensor = std::optional<at::Tensor>;

template <class T> const T* pointer_or_null(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; }

inline void check_launch(const char* op, cudaError_t status, at::IntArrayRef shape) {
  if (status == cudaErrorNoKernelImageForDevice)
    TORCH_CHECK(false, op, ": this build has no kernel for the GPU's architecture; build again with TORCH_CUDA_ARCH_LIST");
  TORCH_CHECK(status == cudaSuccess, op, ": the kernel failed for (B, S, N) = ", shape, ": ", cudaGetErrorString(status));
}

// Launches on the current stream of the device of `like`.
template <class P> void launch_rows(const char* op, const P& p, const at::Tensor& like) {
  const at::Tensor workspace = at::empty({workspace_bytes(p)}, like.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(like.get_device());
  check_launch(op, launch(p, workspace.numel() > 0 ? workspace.mutable_data_ptr() : nullptr, stream), like.sizes());
}

}  // namespace psf::cuda
