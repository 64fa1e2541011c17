// Images moved by elements of the plane, cut into patches: what embed_image's kernels read.
#pragma once
#include <algorithm>
#include <cstdint>

namespace psf {

constexpr int64_t image_border = 2;  // pixels around an image in memory: a place further out reads as one there does

// Images (B, C, H, W), in memory one at a time as (H + 4, W + 4, channels): `channels` is C padded to whole vectors.
struct Images {
  int64_t C, H, W, P, Q, D, S;
  bool replicate;
  const double* frames;  // (B, S, 2, 2); null: turns (B, S) of D4
  const int64_t* turns;

  int64_t channels() const { return C < 3 ? C : (C + 3) / 4 * 4; }
  int64_t stride() const { return (W + 2 * image_border) * channels(); }  // from a row of an image to the next
  int64_t values() const { return (H + 2 * image_border) * stride(); }
  int64_t columns() const { return W / Q; }
  int64_t tokens() const { return H / P * columns(); }  // of a sample
  int64_t width() const { return P * Q * C; }           // of a patch: a row (P, Q, C)
  // Patches at a time: they fit the L2 cache beside a part of the weight, and fill the blocks of a product.
  int64_t tile(int64_t bytes) const { return std::clamp<int64_t>((int64_t{3} << 18) / (width() * bytes) / 6 * 6, 12, 96); }
  int64_t tile_values(int64_t bytes) const { return (tile(bytes) * width() + 31) / 16 * 16; }  // a last pixel is stored as a whole vector
};

template <class T> struct ImageGradients {
  const Images& x;
  const T *pixels, *d_tokens, *panels;  // the weight (D, width) in panels
  double* d_frames;                     // (B, S, 2, 2); null where it is not needed
  T* d_pixels;                          // (B, parts, C, H, W), likewise: the samples of an image in `parts` parts
  int64_t parts;
  int64_t unit(int64_t sample) const { return sample / x.S * parts + sample % x.S * parts / x.S; }  // image and part
  int64_t first(int64_t unit) const { return unit / parts * x.S + (unit % parts * x.S + parts - 1) / parts; }
};

}  // namespace psf
