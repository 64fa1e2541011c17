// embed_image, embed_turned and their gradients on the CPU. A tile of patches is cut from the moved images into memory that
// fits the cache, and multiplied there: no moved image is formed.
#include "../kernels.h"
#include "image.h"
#include "rows.h"
#define PSF_KERNEL "embed_image.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using Maybe = std::optional<Tensor>;

constexpr int64_t weight_groups = 16;  // of samples, each with a weight gradient of its own, for any number of threads

// The checked arguments of a call; plane: matrices or turns.
class Call {
  Arguments in_;
  Dim B_{"B"}, S_{"S"}, C_{"C", 1}, H_{"H", 1}, W_{"W", 1}, P_{"P", 1}, Q_{"Q", 1}, D_{"D", 1}, L_{"L"}, two_{"2", 2, 2};
  Tensor turns_;
  std::vector<double> frames_;

 public:
  Images x;
  Tensor pixels, weight;  // contiguous; the weight as (P Q C, D)

  Call(const char* op, const Tensor& pixels_in, const Tensor& plane, bool turned, const Tensor& weight_in, bool replicate) : in_(op) {
    in_.floats("pixels", pixels_in, {&B_, &C_, &H_, &W_});
    Arguments of_plane(op);
    if (turned) of_plane.integers("turns", plane, {&B_, &S_});
    else of_plane.floats("frames", plane, {&B_, &S_, &two_, &two_});
    in_.floats("weight", weight_in, {&D_, &C_, &P_, &Q_});
    PSF_CHECK_VALUE(H_ % P_ == 0 && W_ % Q_ == 0, op, ": pixels must be whole patches of ", P_.size, " x ", Q_.size, ", got ", H_.size, " x ", W_.size);
    in_.count("H", H_, 1, 32000);  // places of an image are counted in 32 bits
    in_.count("W", W_, 1, 32000);
    L_.size = H_ / P_ * (W_ / Q_);
    turned ? read_turns(plane) : read_frames(plane);
    x = {C_, H_, W_, P_, Q_, D_, S_, replicate, turned ? nullptr : frames_.data(), turned ? turns_.const_data_ptr<int64_t>() : nullptr};
    pixels = pixels_in.contiguous();
    weight = weight_in.permute({2, 3, 1, 0}).contiguous().flatten(0, 2);
  }
  Call(const Call&) = delete;
  int64_t B() const { return B_; }
  int64_t samples() const { return B_ * S_; }
  int64_t rows() const { return samples() * L_; }
  Tensor bias(const Maybe& given) { return in_.floats("bias", given, {&D_}); }
  Tensor d_tokens(const Tensor& given) { return in_.floats("d_tokens", given, {&B_, &S_, &L_, &D_}).contiguous(); }
  Tensor tokens() const { return empty({B_, S_, L_, D_}, weight.options()); }
  Tensor weight_like(const Tensor& rows) const { return rows.view({P_, Q_, C_, D_}).permute({3, 2, 0, 1}); }

 private:
  void read_frames(const Tensor& plane) {
    const Tensor held = plane.contiguous();
    PSF_DISPATCH_FLOATING(held.scalar_type(), [&] {
      const auto* g = held.const_data_ptr<scalar_t>();
      frames_.assign(g, g + held.numel());
    });
    for (const double value : frames_) PSF_CHECK_VALUE(std::isfinite(value), in_.op, ": plane must be finite, got inf or nan");
  }
  void read_turns(const Tensor& plane) {
    turns_ = plane.contiguous();
    const int64_t* turns = turns_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < samples(); ++i)
      PSF_CHECK_VALUE(turns[i] >= 0 && turns[i] <= 7, in_.op, ": plane must hold quarter turns 0 to 7, got ", turns[i]);
    for (int64_t i = 0; i < samples() && H_ != W_; ++i)
      PSF_CHECK_VALUE(turns[i] % 2 == 0, in_.op, ": pixels must be square for quarter turn ", turns[i], ", got ", H_.size, " x ", W_.size);
  }
};

// b (R, K), by its steps, in panels.
template <class T> Tensor panels_of(const Tensor& b, int64_t R, int64_t K, int64_t step_r, int64_t step_k) {
  const Tensor panels = empty({R * (K + 64)}, b.options());
  PSF_DISPATCH(pack_panels<T>(b.const_data_ptr<T>(), R, K, step_r, step_k, panels.mutable_data_ptr<T>()));
  return panels;
}

Tensor tokens_of(Call& call, const Maybe& bias_in) {
  const Images& x = call.x;
  const Tensor bias = call.bias(bias_in), tokens = call.tokens();
  PSF_DISPATCH_FLOATING(tokens.scalar_type(), [&] {
    using T = scalar_t;
    const Tensor panels = panels_of<T>(call.weight, x.width(), x.D, x.D, 1);
    const int64_t threads = get_num_threads(), a_thread = (call.rows() + threads - 1) / threads;
    const int64_t tile = std::clamp<int64_t>((a_thread / 4 + 5) / 6 * 6, 12, x.tile(sizeof(T)));
    const int64_t grain = std::max<int64_t>((a_thread + tile - 1) / tile * tile, 1);
    parallel_for(0, call.rows(), grain, [&](int64_t begin, int64_t end) {
      T* memory = scratch_memory<T>(x.tile_values(sizeof(T)) + x.values());
      PSF_DISPATCH(embed_rows<T>(x, call.pixels.const_data_ptr<T>(), panels.const_data_ptr<T>(), bias.defined() ? bias.const_data_ptr<T>() : nullptr, begin, end,
                                 tile, memory, tokens.mutable_data_ptr<T>()));
    });
  });
  return tokens;
}

// d_pixels, d_weight and d_bias; and those of the frames in d_frames, unless it is null.
std::tuple<Tensor, Tensor, Tensor> gradients(Call& call, const Tensor& d_tokens_in, double* d_frames, bool needs_pixels, bool needs_weight, bool needs_bias) {
  const Images& x = call.x;
  const Tensor d_tokens = call.d_tokens(d_tokens_in);
  const int64_t parts = std::clamp<int64_t>((weight_groups + call.B() - 1) / std::max<int64_t>(call.B(), 1), 1, std::max<int64_t>(x.S, 1));
  const int64_t units = call.samples() ? call.B() * parts : 0, groups = std::clamp<int64_t>(units, 0, needs_weight ? weight_groups : units);
  Tensor d_pixels, d_weights;
  if (needs_pixels) d_pixels = zeros({call.B(), parts, x.C, x.H, x.W}, call.pixels.options());
  if (needs_weight) d_weights = zeros({std::max<int64_t>(groups, 1), x.width() * x.D}, call.weight.options());
  PSF_DISPATCH_FLOATING(d_tokens.scalar_type(), [&] {
    using T = scalar_t;
    if (!needs_pixels && !d_frames && !needs_weight) return;
    const bool back = needs_pixels || d_frames;
    const Tensor panels = back ? panels_of<T>(call.weight, x.D, x.width(), 1, x.D) : Tensor();
    const ImageGradients<T> of{x, call.pixels.const_data_ptr<T>(), d_tokens.const_data_ptr<T>(), back ? panels.const_data_ptr<T>() : nullptr, d_frames,
                               needs_pixels ? d_pixels.mutable_data_ptr<T>() : nullptr, parts};
    T* const d_weight = needs_weight ? d_weights.mutable_data_ptr<T>() : nullptr;
    int64_t scratch = 0;
    PSF_DISPATCH(gradient_scratch<T>(x, scratch));
    for_each_group<T>(groups, scratch, [&](int64_t group, T* memory) {
      const int64_t first = of.first(group * units / groups), end = of.first((group + 1) * units / groups);
      PSF_DISPATCH(embed_gradients<T>(of, first, end, d_weight ? d_weight + group * x.width() * x.D : nullptr, memory));
    });
  });
  return {needs_pixels ? sum(d_pixels, {1}) : Tensor(), needs_weight ? call.weight_like(sum(d_weights, {0})) : Tensor(), needs_bias ? sum(d_tokens, {0, 1, 2}) : Tensor()};
}

Tensor embed_image(const Tensor& pixels, const Tensor& frames, const Tensor& weight, const Maybe& bias, bool replicate) {
  Call call("embed_image", pixels, frames, false, weight, replicate);
  return tokens_of(call, bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> embed_image_backward(const Tensor& d_tokens, const Tensor& pixels, const Tensor& frames, const Tensor& weight,
                                                                bool replicate, bool needs_pixels, bool needs_frames, bool needs_weight, bool needs_bias) {
  Call call("embed_image_backward", pixels, frames, false, weight, replicate);
  std::vector<double> sums(needs_frames ? frames.numel() : 0);
  const auto [d_pixels, d_weight, d_bias] = gradients(call, d_tokens, needs_frames ? sums.data() : nullptr, needs_pixels, needs_weight, needs_bias);
  Tensor d_frames;
  if (needs_frames) {
    d_frames = empty(frames.sizes(), frames.options());
    PSF_DISPATCH_FLOATING(frames.scalar_type(), [&] { std::copy(sums.begin(), sums.end(), d_frames.mutable_data_ptr<scalar_t>()); });
  }
  return {d_pixels, d_frames, d_weight, d_bias};
}

Tensor embed_turned(const Tensor& pixels, const Tensor& turns, const Tensor& weight, const Maybe& bias) {
  Call call("embed_turned", pixels, turns, true, weight, false);
  return tokens_of(call, bias);
}

std::tuple<Tensor, Tensor, Tensor> embed_turned_backward(const Tensor& d_tokens, const Tensor& pixels, const Tensor& turns, const Tensor& weight,
                                                         bool needs_pixels, bool needs_weight, bool needs_bias) {
  Call call("embed_turned_backward", pixels, turns, true, weight, false);
  return gradients(call, d_tokens, nullptr, needs_pixels, needs_weight, needs_bias);
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&embed_image>("embed_image");
  m.add<&embed_image_backward>("embed_image_backward");
  m.add<&embed_turned>("embed_turned");
  m.add<&embed_turned_backward>("embed_turned_backward");
}

}  // namespace psf
