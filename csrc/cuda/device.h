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

// 1 / x for normal x with a normal inverse, to one unit in the last place: an approximation and Newton steps, without the
// branch that an exact quotient needs for other numbers. NaN for 0 and infinity.
#if defined(__CUDACC__)
PSF_STEP float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(y, fmaf(-x, y, 1.0f), y);
}
PSF_STEP double reciprocal(double x) {
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));  // 20 bits
  y = fma(y, fma(-x, y, 1.0), y);
  return fma(y, fma(-x, y, 1.0), y);
}
#else
PSF_STEP float reciprocal(float x) { return 1 / x; }
PSF_STEP double reciprocal(double x) { return 1 / x; }
#endif

}  // namespace psf::cuda
