// Which instruction set the CPU kernels use: each kernel is compiled once for each (each_isa.h) and chosen at run time.
#pragma once

namespace psf {

enum class Isa { baseline, avx2, avx512 };

inline Isa instruction_set() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
      return Isa::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::baseline;
  }();
  return isa;
#else
  return Isa::baseline;
#endif
}

inline const char* instruction_set_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace psf

// PSF_DISPATCH(f(args)) calls the f of the machine's instruction set.
#if defined(__x86_64__)
#define PSF_DISPATCH(...)                                     \
  switch (psf::instruction_set()) {                           \
    case psf::Isa::avx512: psf::avx512::__VA_ARGS__; break;   \
    case psf::Isa::avx2: psf::avx2::__VA_ARGS__; break;       \
    default: psf::baseline::__VA_ARGS__;                      \
  }
#else
#define PSF_DISPATCH(...) psf::baseline::__VA_ARGS__
#endif
