// CUDA keywords that are redefined when the tests compile the kernels for the host.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PSF_BOTH __host__ __device__
#define PSF_UNROLLED _Pragma("unroll")
#define PSF_ROLLED _Pragma("unroll 1")
#else
#define PSF_BOTH
#define PSF_UNROLLED
#define PSF_ROLLED
#endif

namespace psf::cuda {

#include "../laplace_steps.h"

PSF_STEP float exponential(float x) { return expf(x); }
PSF_STEP double exponential(double x) { return exp(x); }
PSF_STEP float logarithm(float x) { return logf(x); }
PSF_STEP double logarithm(double x) { return log(x); }
PSF_STEP float square_root(float x) { return sqrtf(x); }
PSF_STEP double square_root(double x) { return sqrt(x); }
PSF_STEP float magnitude(float x) { return fabsf(x); }
PSF_STEP double magnitude(double x) { return fabs(x); }

}  // namespace psf::cuda
