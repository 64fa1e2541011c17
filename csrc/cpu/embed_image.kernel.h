// Tiles of patches through the product with the weight, and back.
#include "vectors.h"
#include "image.kernel.h"
#include "panels.h"

// The image that a thread has in memory.
template <class T> class HeldImage {
  const Images& x_;
  const T* pixels_;
  T* image_;
  int64_t number_ = -1;

 public:
  HeldImage(const Images& x, const T* pixels, T* image) : x_(x), pixels_(pixels), image_(image) {}
  const T* of_sample(int64_t sample) {
    if (const int64_t b = sample / x_.S; b != number_) read_image(x_, pixels_ + b * x_.C * x_.H * x_.W, image_), number_ = b;
    return image_;
  }
};

// Rows begin..end-1 of the tokens, `tile` at a time.
template <class T>
void embed_rows(const Images& x, const T* pixels, const T* panels, const T* bias, int64_t begin, int64_t end, int64_t tile, T* memory, T* tokens) {
  HeldImage<T> held(x, pixels, memory + x.tile_values(sizeof(T)));
  for (int64_t row = begin; row < end; row += tile) {
    const int64_t rows = std::min(tile, end - row);
    for_each_run(x, row, row + rows, [&](int64_t sample, int64_t patch, int64_t count, int64_t before) {
      cut_patches(x, held.of_sample(sample), sample, patch, count, memory + before * x.width());
    });
    panel_products(memory, x.width(), 1, panels, bias, rows, x.width(), x.D, false, tokens + row * x.D, x.D);
  }
}

template <class T> void gradient_scratch(const Images& x, int64_t& values) {
  values = 2 * x.tile_values(sizeof(T)) + 2 * x.values() + x.tile(sizeof(T)) * (x.D + panel_columns<T>);
}

// The gradients of a group's samples, first..end-1.
template <class T> void embed_gradients(const ImageGradients<T>& call, int64_t first, int64_t end, T* d_weight, T* memory) {
  const Images& x = call.x;
  const int64_t width = x.width(), most = x.tile(sizeof(T)), L = x.tokens(), pixels = x.C * x.H * x.W;
  T *patches = memory, *d_patches = patches + x.tile_values(sizeof(T)), *image = d_patches + x.tile_values(sizeof(T));
  T *d_image = image + x.values(), *panels = d_image + x.values();
  HeldImage<T> held(x, call.pixels, image);
  int64_t unit = -1;  // the one of d_image
  const auto begin_unit = [&](int64_t next) {
    if (unit >= 0) write_image(x, d_image, call.d_pixels + unit * pixels);
    std::memset(d_image, 0, x.values() * sizeof(T));
    unit = next;
  };
  for (int64_t row = first * L; row < end * L; row += most) {
    const int64_t rows = std::min(most, end * L - row);
    const T* d_tokens = call.d_tokens + row * x.D;
    if (d_weight) {
      for_each_run(x, row, row + rows, [&](int64_t sample, int64_t patch, int64_t count, int64_t before) {
        cut_patches(x, held.of_sample(sample), sample, patch, count, patches + before * width);
      });
      pack_panels(d_tokens, rows, x.D, x.D, 1, panels);
      panel_products<T>(patches, 1, width, panels, nullptr, width, rows, x.D, true, d_weight, x.D);
    }
    if (!call.d_pixels && !call.d_frames) continue;
    panel_products<T>(d_tokens, x.D, 1, call.panels, nullptr, rows, x.D, width, false, d_patches, width);
    for_each_run(x, row, row + rows, [&](int64_t sample, int64_t patch, int64_t count, int64_t before) {
      const T* d = d_patches + before * width;
      if (call.d_pixels) {
        if (const int64_t now = call.unit(sample); now != unit) begin_unit(now);
        spread_patches(x, d, sample, patch, count, d_image);
      }
      if (call.d_frames) frame_gradient(x, d, held.of_sample(sample), sample, patch, count, call.d_frames + 4 * sample);
    });
  }
  if (unit >= 0) begin_unit(-1);
}
