// Whether this build has machine code for a GPU: asked of a kernel, since all files are built for the same ones.
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
  cudaGetLastError();  // a failure is no error of the next launch
  cudaSetDevice(current);
  return found;
}

}  // namespace psf::cuda
