// The instruction set of the CPU kernels: each kernel is compiled once per set (each_isa.h) and selected at run time.
#pragma once
#include <c10/util/Exception.h>

#include <atomic>
#include <string>
#include <vector>

// PSF_ISAS: the sets to build, a bit each: baseline 1, avx2 2, avx512 4. setup.py defines it for a build that only this
// machine needs to run.
#if defined(__x86_64__)
#define PSF_EVERY_ISA 7
#else
#define PSF_EVERY_ISA 1
#endif
#if !defined(PSF_ISAS)
#define PSF_ISAS PSF_EVERY_ISA
#endif

namespace psf {

enum class Isa { baseline, avx2, avx512 };

inline const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }
inline int vector_bytes(Isa isa) { return isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

// Whether this build has the set's kernels and this machine its instructions.
inline bool supported(Isa isa) {
  if (!(PSF_ISAS >> static_cast<int>(isa) & 1)) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw");
#endif
  return isa == Isa::baseline;
}

inline std::atomic<Isa>& chosen_instruction_set() {
  static std::atomic<Isa> isa{supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::baseline};
  return isa;
}
inline Isa instruction_set() { return chosen_instruction_set().load(std::memory_order_relaxed); }
template <class T> int lane_count() { return vector_bytes(instruction_set()) / static_cast<int>(sizeof(T)); }

inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline})
    if (supported(isa)) names.emplace_back(name(isa));
  return names;
}

// For tests and benchmarks; not while a kernel runs.
inline void use_instruction_set(const std::string& wanted) {
  for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::baseline})
    if (wanted == name(isa) && supported(isa)) return chosen_instruction_set().store(isa);
  std::string have;
  for (const std::string& x : instruction_sets()) have += " " + x;
  TORCH_CHECK_VALUE(false, "use_instruction_set: name must be one of", have, " on this machine, got ", wanted);
}

}  // namespace psf

// PSF_DISPATCH(f(args)) calls the f of the chosen instruction set.
#if PSF_ISAS & 1
#define PSF_CASE_BASELINE(...) case psf::Isa::baseline: psf::baseline::__VA_ARGS__; break;
#else
#define PSF_CASE_BASELINE(...)
#endif
#if PSF_ISAS & 2
#define PSF_CASE_AVX2(...) case psf::Isa::avx2: psf::avx2::__VA_ARGS__; break;
#else
#define PSF_CASE_AVX2(...)
#endif
#if PSF_ISAS & 4
#define PSF_CASE_AVX512(...) case psf::Isa::avx512: psf::avx512::__VA_ARGS__; break;
#else
#define PSF_CASE_AVX512(...)
#endif
#define PSF_DISPATCH(...)           \
  switch (psf::instruction_set()) { \
    PSF_CASE_BASELINE(__VA_ARGS__)  \
    PSF_CASE_AVX2(__VA_ARGS__)      \
    PSF_CASE_AVX512(__VA_ARGS__)    \
    default: break;                 \
  }
