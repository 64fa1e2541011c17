#include "permutation_entropy.h"
#include "launch.h"

namespace psf::cuda {

PSF_LAUNCHES(PermutationEntropy<float>)
PSF_LAUNCHES(PermutationEntropy<double>)
PSF_LAUNCHES(PermutationEntropyBackward<float>)
PSF_LAUNCHES(PermutationEntropyBackward<double>)

// One block adds in a fixed order, so that sums repeat bit by bit.
template <class T> __global__ void __launch_bounds__(256) add_up_kernel(const double* sums, int64_t count, T* out) {
  __shared__ double part[256];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += 256) sum += sums[i];
  part[threadIdx.x] = sum;
  for (unsigned half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = static_cast<T>(count > 0 ? part[0] : NAN);  // as the mean of nothing
}
template <class T> cudaError_t add_up(const double* sums, int64_t count, T* out, cudaStream_t stream) {
  return start(add_up_kernel<T>, 1, 256, 0, stream, sums, count, out);
}
template cudaError_t add_up(const double*, int64_t, float*, cudaStream_t);
template cudaError_t add_up(const double*, int64_t, double*, cudaStream_t);

}  // namespace psf::cuda
