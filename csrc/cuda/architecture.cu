// Whether this build has machine code for a GPU. One kernel answers for all files, which are built for the same GPUs.
#include "architecture.h"

#include <cuda_runtime.h>

namespace psf::cuda {

namespace {
__global__ void no_work() {}
}  // namespace

bool runs_on(int device) {
  int current = 0;
  cudaFuncAttributes attributes;
  if (cudaGetDevice(&current) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return false;
  const bool found = cudaFuncGetAttributes(&attributes, no_work) == cudaSuccess;
  cudaGetLastError();  // clears the error, so that the next launch does not report it
  cudaSetDevice(current);
  return found;
}

}  // namespace psf::cuda
