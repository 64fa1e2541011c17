// act_orthogonal and its gradient on the CPU: act_orthogonal.kernel.h computes one sample.
// Vectors are (B, n, d, C), shared by the samples, or (B, S, n, d, C); frames (B, S, d, d).
#include "../kernels.h"
#include "rows.h"
#define PSF_KERNEL "act_orthogonal.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

struct Shape {
  Dim B{"B"}, S{"S", 1}, n{"n"}, d{"d"}, C{"C"};
  bool per_sample;
  Shape(Arguments& in, const Tensor& vectors, const Tensor& frames) : per_sample(vectors.dim() == 5) {
    in.floats("frames", frames, {&B, &S, &d, &d});
    if (per_sample) in.floats("vectors", vectors, {&B, &S, &n, &d, &C});
    else in.floats("vectors", vectors, {&B, &n, &d, &C});
  }
  int64_t size() const { return n * d * C; }
  int64_t vectors_at(int64_t b, int64_t s) const { return (per_sample ? b * S + s : b) * size(); }
};

Tensor act_orthogonal(const Tensor& vectors_in, const Tensor& frames_in, bool inverse, bool mean) {
  Arguments in("act_orthogonal");
  const Shape x(in, vectors_in, frames_in);
  const Tensor vectors = vectors_in.contiguous(), frames = frames_in.contiguous();
  const Tensor out = empty(mean ? IntArrayRef{x.B, x.n, x.d, x.C} : IntArrayRef{x.B, x.S, x.n, x.d, x.C}, vectors.options());
  PSF_DISPATCH_FLOATING(vectors.scalar_type(), [&] {
    using T = scalar_t;
    const T* v = vectors.const_data_ptr<T>();
    const T* g = frames.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    parallel_for(0, x.B, grain(double(x.S) * double(x.size()), 4096), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t s = 0; s < x.S; ++s)
          PSF_DISPATCH(act_vectors<T>(g + (b * x.S + s) * x.d * x.d, v + x.vectors_at(b, s),
                                      y + (mean ? b : b * x.S + s) * x.size(), x.n, x.d, x.C, inverse, mean && s > 0,
                                      mean ? T(1) / T(x.S) : T(1)));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> act_orthogonal_backward(const Tensor& d_out_in, const Tensor& vectors_in, const Tensor& frames_in,
                                                   bool inverse, bool mean, bool needs_vectors, bool needs_frames) {
  Arguments in("act_orthogonal_backward");
  Shape x(in, vectors_in, frames_in);
  if (mean) in.floats("d_out", d_out_in, {&x.B, &x.n, &x.d, &x.C});
  else in.floats("d_out", d_out_in, {&x.B, &x.S, &x.n, &x.d, &x.C});
  const Tensor d_out = d_out_in.contiguous(), vectors = vectors_in.contiguous(), frames = frames_in.contiguous();
  const Tensor d_vectors = needs_vectors ? empty_like(vectors) : Tensor(), d_frames = needs_frames ? empty_like(frames) : Tensor();
  PSF_DISPATCH_FLOATING(vectors.scalar_type(), [&] {
    using T = scalar_t;
    const T *v = vectors.const_data_ptr<T>(), *g = frames.const_data_ptr<T>(), *dy = d_out.const_data_ptr<T>();
    T *d_v = needs_vectors ? d_vectors.mutable_data_ptr<T>() : nullptr, *d_g = needs_frames ? d_frames.mutable_data_ptr<T>() : nullptr;
    const T scale = mean ? T(1) / T(x.S) : T(1);
    parallel_for(0, x.B, grain(double(x.S) * double(x.size()), 4096), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t s = 0; s < x.S; ++s) {
          const int64_t sample = b * x.S + s, from = (mean ? b : sample) * x.size(), to = x.vectors_at(b, s);
          if (needs_vectors)
            PSF_DISPATCH(act_vectors<T>(g + sample * x.d * x.d, dy + from, d_v + to, x.n, x.d, x.C, !inverse,
                                        !x.per_sample && s > 0, scale));
          if (needs_frames)
            PSF_DISPATCH(frame_gradient<T>(dy + from, v + to, d_g + sample * x.d * x.d, x.n, x.d, x.C, inverse, scale));
        }
    });
  });
  return {d_vectors, d_frames};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&act_orthogonal>("act_orthogonal");
  m.add<&act_orthogonal_backward>("act_orthogonal_backward");
}

}  // namespace psf
