// The part of the CUDA runtime that csrc/cuda uses, on the host: found before CUDA's own, so that the files that nvcc
// compiles are compiled unchanged, kernels and launches.
#pragma once
#include <cstring>
#include <tuple>

#include "emulator.h"

#define __global__
#define __launch_bounds__(...)
#define __shared__ thread_local  // static, and `extern` where CUDA has it: the threads of a block are coroutines of one thread

template <unsigned (*ask)()> struct Asked {
  struct {
    operator unsigned() const { return ask(); }
  } x;
};
inline constexpr Asked<emulated::thread> threadIdx;
inline constexpr Asked<emulated::block> blockIdx;
inline constexpr Asked<emulated::threads> blockDim;
inline constexpr Asked<emulated::blocks> gridDim;

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) emulated::meet(false, -1);
}
template <class T> T shuffled(unsigned mask, T x, int from, int call) {
  static_assert(sizeof x <= 8);
  check_mask(mask);
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  word = emulated::shuffle(word, from, call);
  std::memcpy(&x, &word, sizeof x);
  return x;
}
template <class T> T __shfl_up_sync(unsigned mask, T x, int lanes) {
  const int lane = emulated::lane();
  return shuffled(mask, x, lane >= lanes ? lane - lanes : lane, 100 + lanes);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, int lanes) {
  const int lane = emulated::lane();
  return shuffled(mask, x, lane + lanes < 32 ? lane + lanes : lane, 200 + lanes);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return shuffled(mask, x, emulated::lane() ^ lanes, 300 + lanes);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  check_mask(mask);
  emulated::meet(false, 1);
}
inline void __syncthreads() { emulated::meet(true, 2); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure, cudaErrorNoKernelImageForDevice };

struct cudaLaunchConfig_t {
  emulated::Size gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline const char* last_error = nullptr;  // of a launch

template <class... A, class... B> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(A...), B&&... given) {
  struct Call {
    void (*kernel)(A...);
    std::tuple<std::decay_t<A>...> arguments;
  } const call{kernel, {given...}};
  const auto body = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.arguments);
  };
  const emulated::Grid grid{config->gridDim, config->blockDim, static_cast<int64_t>(config->dynamicSmemBytes)};
  last_error = config->stream == emulated::stream() ? emulated::launch(grid, body, &call, sizeof call) : "not on torch's stream";
  return last_error ? cudaErrorLaunchFailure : cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return last_error ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return last_error ? last_error : "no error"; }
