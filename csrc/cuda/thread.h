// A thread's operations with the others of its block. The tests run them, and all that is launched, on the host
// (tests/cuda_host).
#pragma once

namespace psf::cuda {

struct Thread {
  static constexpr unsigned all = 0xffffffffu;
  PSF_STEP int index() const { return static_cast<int>(threadIdx.x); }
  PSF_STEP int count() const { return static_cast<int>(blockDim.x); }
  template <class T> PSF_STEP T shuffle_up(T x, int lanes) const { return __shfl_up_sync(all, x, lanes); }
  template <class T> PSF_STEP T shuffle_down(T x, int lanes) const { return __shfl_down_sync(all, x, lanes); }
  template <class T> PSF_STEP T shuffle_xor(T x, int mask) const { return __shfl_xor_sync(all, x, mask); }
  PSF_STEP void sync_warp() const { __syncwarp(); }
  PSF_STEP void sync_block() const { __syncthreads(); }
};

}  // namespace psf::cuda
