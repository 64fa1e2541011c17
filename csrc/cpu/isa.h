// The instruction set of the CPU kernels: each kernel is compiled once per set (each_isa.h) and selected at run time.
#pragma once
#include <atomic>
#include <string>
#include <vector>

#include "../tensor.h"

namespace psf {

enum class Isa { baseline, avx2, avx512 };

inline const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }
inline int vector_bytes(Isa isa) { return isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

inline bool supported(Isa isa) {
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
  PSF_CHECK_VALUE(false, "use_instruction_set: name must be one of", have, " on this machine, got ", wanted);
}

}  // namespace psf

// PSF_DISPATCH(f(args)) calls the f of the chosen instruction set.
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
