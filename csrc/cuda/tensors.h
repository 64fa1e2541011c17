// The CUDA ops' side of torch: the device, the stream, the workspace, and what is said when a launch fails.
#pragma once
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kernels.h"

namespace psf::cuda {

using OptionalTensor = std::optional<at::Tensor>;

// Every tensor must be on the device of the first.
inline void check_device(const char* op, const at::Tensor& first,
                         std::initializer_list<std::pair<const char*, const at::Tensor*>> others) {
  for (const auto& [name, x] : others)
    TORCH_CHECK(!x->defined() || x->device() == first.device(), op, ": ", name, " must be on ", first.device(), ", got ",
                x->device());
}
inline at::Tensor or_undefined(const OptionalTensor& x) { return x && x->defined() ? x->contiguous() : at::Tensor(); }

template <class T> const T* pointer_or_null(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; }

inline void check_launch(const char* op, cudaError_t status, at::IntArrayRef shape) {
  if (status == cudaErrorNoKernelImageForDevice)
    TORCH_CHECK(false, op, ": this build has no kernel for the GPU's architecture; build again with TORCH_CUDA_ARCH_LIST");
  TORCH_CHECK(status == cudaSuccess, op, ": the kernel failed for (B, S, N) = ", shape, ": ", cudaGetErrorString(status));
}

// Slots are counted in 32 bits.
inline void check_length(const char* op, int64_t N) {
  TORCH_CHECK_VALUE(N < 1 << 24, op, ": N must be below ", 1 << 24, " on a GPU, got ", N);
}

// Launches on the current stream of the device that `like` is on.
template <class P> void launch_rows(const char* op, const P& p, const at::Tensor& like) {
  const at::Tensor workspace = at::empty({workspace_bytes(p)}, like.options().dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(like.get_device());
  check_launch(op, launch(p, workspace.numel() > 0 ? workspace.mutable_data_ptr() : nullptr, stream), like.sizes());
}

}  // namespace psf::cuda
