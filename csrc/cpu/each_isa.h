// Includes the header PSF_KERNEL once for each instruction set, inside namespace psf::baseline, psf::avx2, psf::avx512.
// No include guard: every op includes it. simd.h comes before the header, in the same namespace, with vectors as wide as the
// registers of the instruction set. The header may include laplace.h, which is written for the same use.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "tile.h"

#define PSF_VECTOR_BYTES 16
namespace psf::baseline {
#include "simd.h"
#include PSF_KERNEL
}  // namespace psf::baseline
#undef PSF_VECTOR_BYTES

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define PSF_VECTOR_BYTES 32
namespace psf::avx2 {
#include "simd.h"
#include PSF_KERNEL
}  // namespace psf::avx2
#undef PSF_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define PSF_VECTOR_BYTES 64
#define PSF_AVX512
namespace psf::avx512 {
#include "simd.h"
#include PSF_KERNEL
}  // namespace psf::avx512
#undef PSF_AVX512
#undef PSF_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
