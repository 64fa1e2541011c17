// The kernel shared by all row ops, and its launch.
#pragma once
#include <cuda_runtime.h>

#include "kernels.h"
#include "plan.h"
#include "thread.h"

namespace psf::cuda {

template <class P, int K, bool many>
__global__ void __launch_bounds__(many ? most_threads : warp_size, 1) each_row(const P p, char* workspace, const Plan plan) {
  using T = typename P::Number;
  extern __shared__ double shared_memory[];
  Team<Thread, T, many> team{{}, nullptr};
  if constexpr (many) {
    __shared__ Shared<T> shared;
    team.shared = &shared;
  }
  char* const memory = workspace + blockIdx.x * plan.workspace_bytes;
  char* const keep = plan.shared_bytes > 0 ? reinterpret_cast<char*>(shared_memory) : memory + plan.arena_bytes;
  T* const saved = reinterpret_cast<T*>(keep);
  const Arena arena{memory, static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x)};
  compute_rows<K>(team, arena, saved, p, plan.shape.slots, blockIdx.x, gridDim.x);
}

template <class P> int64_t workspace_bytes(const P& p) {
  const Plan plan = plan_of(p);
  return plan.workspace_bytes * plan.blocks;
}

// The launch's status. A plain function, so that a compiler for the host reads this file too (tests/cuda_host).
template <class... A, class... B>
cudaError_t start(void (*kernel)(A...), int blocks, int threads, int64_t shared_bytes, cudaStream_t stream, const B&... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, given...);
  return cudaGetLastError();
}

template <class P> cudaError_t launch_as(const Plan& plan, const P& p, void* workspace, cudaStream_t stream) {
  return with_shape(plan.shape, [&](auto K, auto many) {
    char* const memory = static_cast<char*>(workspace);
    return start(each_row<P, K.value, many.value>, plan.blocks, plan.shape.threads, plan.shared_bytes, stream, p, memory, plan);
  });
}

template <class P> cudaError_t launch(const P& p, void* workspace, cudaStream_t stream) {
  return p.rows == 0 ? cudaSuccess : launch_as(plan_of(p), p, workspace, stream);
}

#define PSF_LAUNCHES(P)                       \
  template int64_t workspace_bytes(const P&); \
  template cudaError_t launch(const P&, void*, cudaStream_t);

}  // namespace psf::cuda
