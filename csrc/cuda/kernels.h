// What the .cu files provide to the .cpp files, so that nvcc needs no torch headers. P: one of arguments.h.
#pragma once
#include <cuda_runtime_api.h>

#include "arguments.h"

namespace psf::cuda {

template <class P> int64_t workspace_bytes(const P& p);
template <class P> cudaError_t launch(const P& p, void* workspace, cudaStream_t stream);  // the launch's status
template <class T> cudaError_t add_up(const double* sums, int64_t count, T* out, cudaStream_t stream);  // NaN for none

}  // namespace psf::cuda
