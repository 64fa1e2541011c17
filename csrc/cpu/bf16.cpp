// A tile register holds 16 rows of 32 bfloat16 values, or of 16 sums. One instruction adds the products of 16 x 32 values with
// 32 x 16, of which each two rows lie side by side: 16 outputs of a map, 32 of its inputs, the 16 lanes of a row of a plane.
#include "bf16.h"

#if PSF_AMX
#include <algorithm>
#include <cmath>
#include <cpuid.h>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

#include "network.h"
#include "tile.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,avx2,fma")
#endif
#define PSF_VECTOR_BYTES 64
#define PSF_AVX512
namespace psf::amx {
#include "simd.h"

#include "planes.h"

using Half = uint16_t;  // a bfloat16 value
constexpr int64_t L = 16, depth = 32, tile = L * depth;  // lanes, values of a sum at a time, values of a register

// Compilers order memory around the intrinsics only like this.
inline void fence() { asm volatile("" ::: "memory"); }

// a's 16 values, then those of b.
inline __m512i rounded(Vec<float> a, Vec<float> b) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }

// A row of a plane: features 2 i and 2 i + 1 side by side in every lane, 0 after the last one.
inline void to_pairs(const float* x, int64_t in, Half* to) {
  alignas(64) Half places[depth];
  for (int64_t l = 0; l < L; ++l) places[2 * l] = static_cast<Half>(l), places[2 * l + 1] = static_cast<Half>(L + l);
  const __m512i order = _mm512_load_si512(places);
  for (int64_t i = 0; i < whole_tiles(in, depth); i += 2) {
    const Vec<float> a = i < in ? load(x + i * L) : Vec<float>{}, b = i + 1 < in ? load(x + (i + 1) * L) : Vec<float>{};
    _mm512_storeu_si512(to + i * L, _mm512_permutexvar_epi16(order, rounded(a, b)));
  }
}

struct Linear {
  const float* bias;  // (outputs in whole tiles, L)
  const float* packed;
  int64_t in, out;
  bool add;
  float* y;
  int64_t y_step;

  // `rows` of two rows, as pairs x, into y.
  void two_rows(const Half* x, int64_t row, int64_t rows) const {
    alignas(64) float sums[4 * L * L];
    const int64_t K = whole_tiles(in, depth) * L;  // values of a row
    const Half* w = reinterpret_cast<const Half*>(packed);
    const Half *x0 = x, *x1 = rows > 1 ? x + K : x;
    for (int64_t o = 0; o < out; o += 2 * L) {
      const bool both = o + L < out;
      const Half *w0 = w + o / L * K, *w1 = both ? w0 + K : w0;
      const float *b0 = bias + o * L, *b1 = both ? b0 + L * L : b0;
      _tile_loadd(0, b0, 64);
      _tile_loadd(1, b1, 64);
      _tile_loadd(2, b0, 64);
      _tile_loadd(3, b1, 64);
      for (int64_t k = 0; k < K; k += tile) {
        _tile_loadd(4, w0 + k, 64);
        _tile_loadd(6, x0 + k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, w1 + k, 64);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, x1 + k, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      float *y0 = y + row * y_step + o * L, *y1 = y0 + y_step;
      if (o + 2 * L <= out && rows > 1 && !add) {
        _tile_stored(0, y0, 64);
        _tile_stored(1, y0 + L * L, 64);
        _tile_stored(2, y1, 64);
        _tile_stored(3, y1 + L * L, 64);
        continue;
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + L * L, 64);
      _tile_stored(2, sums + 2 * L * L, 64);
      _tile_stored(3, sums + 3 * L * L, 64);
      fence();
      const int64_t values = std::min(2 * L, out - o) * L;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < values; i += L) {
          float* const to = y0 + r * y_step + i;
          const Vec<float> sum = load(sums + r * 2 * L * L + i);
          store(to, add ? load(to) + sum : sum);
        }
      fence();
    }
  }
};

inline void add_to(float* d, const float* sums, int64_t count) {
  const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
  _mm512_mask_storeu_ps(d, some, _mm512_add_ps(_mm512_maskz_loadu_ps(some, d), _mm512_loadu_ps(sums)));
}

struct WeightGradient {
  const float *dy, *x;
  int64_t dy_step, x_step, in, out;
  Half* panel;
  float* d;
  int64_t d_step;

  // Adds that of `rows` rows. Two rows are 32 terms of each sum.
  void some_rows(int64_t first, int64_t rows) const {
    const int64_t outs = whole_tiles(out, L), ins = whole_tiles(in, L), pairs = (rows + 1) / 2;
    Half *const left = panel, *const right = panel + pairs * outs * depth;
    for (int64_t p = 0; p < pairs; ++p) {
      const bool both = 2 * p + 1 < rows;
      const float *from = dy + (first + 2 * p) * dy_step, *given = x + (first + 2 * p) * x_step;
      for (int64_t o = 0; o < outs; ++o)
        _mm512_storeu_si512(left + (p * outs + o) * depth, rounded(o < out ? load(from + o * L) : Vec<float>{}, both && o < out ? load(from + dy_step + o * L) : Vec<float>{}));
      for (int64_t i = 0; i < ins; i += L) {
        Vec<float> v[L];
        for (int64_t k = 0; k < L; ++k)
          v[k] = (Vec<float>)rounded(i + k < in ? load(given + (i + k) * L) : Vec<float>{}, both && i + k < in ? load(given + x_step + (i + k) * L) : Vec<float>{});
        transpose(v);
        for (int64_t k = 0; k < L; ++k) store(right + (p * ins + i + k) * depth, v[k]);
      }
    }
    fence();
    alignas(64) float sums[4 * L * L];
    for (int64_t o = 0; o < out; o += 2 * L)
      for (int64_t i = 0; i < in; i += 2 * L) {
        const Half *a0 = left + o * depth, *a1 = o + L < out ? a0 + tile : a0, *b0 = right + i * depth, *b1 = i + L < in ? b0 + tile : b0;
        float* const to = d + o * d_step + i;
        const bool whole = o + 2 * L <= out && i + 2 * L <= in;
        if (whole) {
          _tile_loadd(0, to, d_step * 4);
          _tile_loadd(1, to + L, d_step * 4);
          _tile_loadd(2, to + L * d_step, d_step * 4);
          _tile_loadd(3, to + L * d_step + L, d_step * 4);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t p = 0; p < pairs; ++p) {
          _tile_loadd(4, a0 + p * outs * depth, 64);
          _tile_loadd(6, b0 + p * ins * depth, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b1 + p * ins * depth, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a1 + p * outs * depth, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        if (whole) {
          _tile_stored(0, to, d_step * 4);
          _tile_stored(1, to + L, d_step * 4);
          _tile_stored(2, to + L * d_step, d_step * 4);
          _tile_stored(3, to + L * d_step + L, d_step * 4);
          continue;
        }
        _tile_stored(0, sums, 128);  // (2 L, 2 L)
        _tile_stored(1, sums + L, 128);
        _tile_stored(2, sums + 2 * L * L, 128);
        _tile_stored(3, sums + 2 * L * L + L, 128);
        fence();
        for (int64_t k = 0; k < std::min(2 * L, out - o); ++k)
          for (int64_t j = 0; j < 2 * L && i + j < in; j += L) add_to(to + k * d_step + j, sums + k * 2 * L + j, std::min(L, in - i - j));
        fence();
      }
    fence();
  }
};

inline void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  fence();
  _tile_loadconfig(&shapes);
}
inline void release() { _tile_release(); }

}  // namespace psf::amx
#undef PSF_AVX512
#undef PSF_VECTOR_BYTES

namespace psf {

void pack_bf16(const float* w, int64_t out, int64_t in, int64_t step_out, int64_t step_in, float* packed) {
  using namespace amx;
  Half* to = reinterpret_cast<Half*>(packed);  // (outputs / 16, inputs / 32, 16, 32)
  for (int64_t o = 0; o < out; o += L)
    for (int64_t i = 0; i < in; i += depth)
      for (int64_t k = 0; k < L; ++k, to += depth) {
        alignas(64) float row[depth];
        for (int64_t j = 0; j < depth; ++j) row[j] = o + k < out && i + j < in ? w[(o + k) * step_out + (i + j) * step_in] : 0;
        _mm512_storeu_si512(to, rounded(load(row), load(row + L)));
      }
}

void linear_bf16(const float* x, int64_t x_step, int64_t rows, const float* packed, const float* bias, int64_t in, int64_t out, bool add, float* y, int64_t y_step, float* panel) {
  using namespace amx;
  const int64_t outs = whole_tiles(out, L);
  for (int64_t o = 0; o < outs; ++o) store(panel + o * L, bias && o < out ? splat<float>(bias[o]) : Vec<float>{});
  Half* const pairs = reinterpret_cast<Half*>(panel + outs * L);
  const Linear map{panel, packed, in, out, add, y, y_step};
  for (int64_t r = 0; r < rows; r += 2) {
    const int64_t some = std::min<int64_t>(2, rows - r);
    for (int64_t k = 0; k < some; ++k) to_pairs(x + (r + k) * x_step, in, pairs + k * whole_tiles(in, depth) * L);
    fence();
    map.two_rows(pairs, r, some);
    fence();
  }
}

void weight_gradient_bf16(const float* dy, int64_t dy_step, const float* x, int64_t x_step, int64_t rows, int64_t in, int64_t out, float* panel, float* d, int64_t d_step, float* d_bias) {
  using namespace amx;
  for (int64_t o = 0; d_bias && o < out; ++o) {
    Vec<float> sum{};
    for (int64_t r = 0; r < rows; ++r) sum += load(dy + r * dy_step + o * L);
    d_bias[o] += lane_sum<float>(sum);
  }
  const WeightGradient sums{dy, x, dy_step, x_step, in, out, reinterpret_cast<Half*>(panel), d, d_step};
  for (int64_t r = 0; r < rows; r += bf16_rows) sums.some_rows(r, std::min(bf16_rows, rows - r));
}

TileRegisters::TileRegisters(bool on) : on_(on) {
  if (on_) amx::configure();
}
TileRegisters::~TileRegisters() {
  if (on_) amx::release();
}

}  // namespace psf
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace psf {

bool has_bf16_products() {
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // amx-bf16, amx-tile
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;                     // avx512-bf16
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the registers */) == 0;
  }();
  return has;
}

}  // namespace psf
#else
namespace psf {
TileRegisters::TileRegisters(bool on) : on_(on) {}
TileRegisters::~TileRegisters() {}
}  // namespace psf
#endif
