// Products of bfloat16 values with sums in float32, on the tile registers of AMX. What goes in and comes out are planes of 16
// sequences in float32 (planes.h); their values are rounded on the way. AVX-512's own bfloat16 instruction is no faster than
// float32 where it has been measured (docs/one-pass.md), so it is not used.
#pragma once
#include "isa.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define PSF_AMX 1
#else
#define PSF_AMX 0
#endif

namespace psf {

// Whether this machine has them: processor and operating system.
#if PSF_AMX
bool has_bf16_products();
#else
inline bool has_bf16_products() { return false; }
#endif
// Whether a kernel for values of T multiplies in bfloat16 where it is allowed.
template <class T> bool takes_bf16(bool allowed) {
  return allowed && sizeof(T) == 4 && instruction_set() == Isa::avx512 && has_bf16_products();
}

inline int64_t whole_tiles(int64_t count, int64_t tile) { return (count + tile - 1) / tile * tile; }
// Float32 values of a packed matrix.
inline int64_t bf16_packed(int64_t in, int64_t out) { return whole_tiles(in, 32) * whole_tiles(out, 16) / 2; }
// Vectors of scratch for maps of up to `widest` inputs and outputs. back: for the gradients of their weights too.
constexpr int64_t bf16_rows = 16;  // at a time there
inline int64_t bf16_panel(int64_t widest, bool back) { return (back ? bf16_rows : 2) * whole_tiles(widest, 32); }

// Sets up this thread's tile registers, where `on`.
class TileRegisters {
  [[maybe_unused]] const bool on_;

 public:
  explicit TileRegisters(bool on);
  ~TileRegisters();
  TileRegisters(const TileRegisters&) = delete;
};

// As `pack`, `linear` and `weight_gradient` of planes.h.
void pack_bf16(const float* w, int64_t out, int64_t in, int64_t step_out, int64_t step_in, float* packed);
void linear_bf16(const float* x, int64_t x_step, int64_t rows, const float* packed, const float* bias, int64_t in, int64_t out, bool add, float* y, int64_t y_step, float* panel);
void weight_gradient_bf16(const float* dy, int64_t dy_step, const float* x, int64_t x_step, int64_t rows, int64_t in, int64_t out, float* panel, float* d, int64_t d_step, float* d_bias);

}  // namespace psf
