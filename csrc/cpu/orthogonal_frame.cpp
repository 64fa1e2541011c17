// orthogonal_frame and its gradient on the CPU for d <= 3: the computation is in orthogonal_frame.kernel.h.
#include "../kernels.h"
#include "rows.h"
#define PSF_KERNEL "orthogonal_frame.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

// The d of matrices (..., d, d).
int check(Arguments& in, const Tensor& matrices) {
  in.floats("matrices", matrices);
  const int64_t axes = matrices.dim(), d = axes < 2 ? 0 : matrices.size(-1);
  PSF_CHECK_VALUE(d >= 1 && d <= 3 && matrices.size(-2) == d, in.op, ": matrices must be (..., d, d) with d in 1..3, got ",
                    matrices.sizes());
  return static_cast<int>(d);
}

Tensor orthogonal_frame(const Tensor& matrices_in, bool special) {
  Arguments in("orthogonal_frame");
  const int d = check(in, matrices_in);
  const Tensor matrices = matrices_in.contiguous(), out = empty_like(matrices);
  const int64_t M = matrices.numel() / (d * d);
  std::atomic<bool> finite{true};
  PSF_DISPATCH_FLOATING(matrices.scalar_type(), [&] {
    using T = scalar_t;
    for_each_lane<T>(M, d * d, [&](int64_t first, int rows, T* scratch) {
      bool ok = true;
      PSF_DISPATCH(orthogonal_frame_lanes<T>(matrices.const_data_ptr<T>() + first * d * d, rows, d, special, scratch,
                                             out.mutable_data_ptr<T>() + first * d * d, &ok));
      if (!ok) finite = false;
    });
  });
  PSF_CHECK_VALUE(finite, "orthogonal_frame: matrices must be finite, got NaN or infinity");
  return out;
}

Tensor orthogonal_frame_backward(const Tensor& d_frames_in, const Tensor& frames_in, const Tensor& matrices_in) {
  Arguments in("orthogonal_frame_backward");
  const int d = check(in, matrices_in);
  in.same_shape("d_frames", in.floats("d_frames", d_frames_in), "matrices", matrices_in);
  in.same_shape("frames", in.floats("frames", frames_in), "matrices", matrices_in);
  const Tensor d_frames = d_frames_in.contiguous(), frames = frames_in.contiguous(), matrices = matrices_in.contiguous();
  const Tensor out = empty_like(matrices);
  const int64_t M = matrices.numel() / (d * d);
  PSF_DISPATCH_FLOATING(matrices.scalar_type(), [&] {
    using T = scalar_t;
    for_each_lane<T>(M, 3 * d * d, [&](int64_t first, int rows, T* scratch) {
      const int64_t at = first * d * d;
      PSF_DISPATCH(orthogonal_frame_backward_lanes<T>(d_frames.const_data_ptr<T>() + at, frames.const_data_ptr<T>() + at,
                                                      matrices.const_data_ptr<T>() + at, rows, d, scratch,
                                                      out.mutable_data_ptr<T>() + at));
    });
  });
  return out;
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&orthogonal_frame>("orthogonal_frame");
  m.add<&orthogonal_frame_backward>("orthogonal_frame_backward");
}

}  // namespace psf
