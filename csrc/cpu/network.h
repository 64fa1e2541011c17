// Networks whose weights are one row: where each part begins, and the tiles of sequences that go through all layers at once.
#pragma once
#include "bf16.h"
#include "rows.h"

#include <cstring>
#include <numeric>

namespace psf {

// A linear map: its (out, in) matrix, `step` values from a row to the next, and (out,) bias; what begins where.
struct LinearPart {
  int64_t in = 0, out = 0, step = 0, weight = 0, bias = 0;
  int64_t forward = 0, back = 0;  // in the packed matrices: for its output, and for the gradient of its input
};
struct NormPart {
  int64_t gain = 0, shift = 0;
};

// Lays parts out in a row, one after the other.
struct WeightRow {
  int64_t weights = 0, packed = 0;  // values so far
  int64_t take(int64_t count) {
    weights += count;
    return weights - count;
  }
  // For a packed matrix: the padding of any instruction set fits, and that of bfloat16 products. It ends where a cache line does.
  static int64_t room(int64_t in, int64_t out) { return whole_tiles(std::max((out + 3) * in, bf16_packed(in, out)), 16); }
  // Of a matrix that begins at `weight`; its bias too if there is one.
  LinearPart part(int64_t in, int64_t out, int64_t step, int64_t weight, int64_t bias) {
    const int64_t forward = packed, back = forward + room(in, out);
    packed = back + room(out, in);
    return {in, out, step, weight, bias, forward, back};
  }
  LinearPart linear(int64_t in, int64_t out) {
    const int64_t weight = take(in * out);
    return part(in, out, in, weight, take(out));
  }
  NormPart norm(int64_t width) {
    const int64_t gain = take(width);
    return {gain, take(width)};
  }
};

enum Activation : int64_t { tanh_activation, relu_activation, gelu_activation, silu_activation };  // as in ops/reference/_parts.py

template <class T> struct Weights {
  const T* row;
  T* packed;
  bool bf16 = false;  // whether it is packed for products in bfloat16
};

// Sequences side by side, one a lane.
template <class T> struct Sequences {
  int64_t number[64 / sizeof(T)] = {};  // which of the batch
  int64_t length[64 / sizeof(T)] = {};  // valid rows, 0 in a lane without a sequence
  int64_t rows = 0;                     // the most valid ones
  int count = 0;
  bool ragged = false;
};

// A batch of M sequences of up to `rows` rows in tiles; with lengths those of nearly the same length go together.
class Tiles {
  std::vector<int64_t> order_, length_;
  int64_t rows_;

 public:
  const int64_t M;
  Tiles(int64_t M, int64_t rows) : rows_(rows), M(M) {}
  Tiles(int64_t M, int64_t rows, const int64_t* lengths) : order_(M), length_(lengths, lengths + M), rows_(rows), M(M) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return length_[a] > length_[b]; });
  }
  template <class T> int64_t count() const { return (M + lane_count<T>() - 1) / lane_count<T>(); }
  template <class T> Sequences<T> tile(int64_t number) const {
    Sequences<T> some;
    if (!order_.empty()) number = number % 2 ? count<T>() - 1 - number / 2 : number / 2;  // long ones and short ones in turn: as much work for every thread
    const int64_t first = number * lane_count<T>();
    some.count = static_cast<int>(std::min<int64_t>(lane_count<T>(), M - first));
    some.ragged = !order_.empty();
    for (int l = 0; l < some.count; ++l) {
      some.number[l] = some.ragged ? order_[first + l] : first + l;
      some.length[l] = some.ragged ? length_[some.number[l]] : rows_;
      some.rows = std::max(some.rows, some.length[l]);
    }
    return some;
  }
};

constexpr int64_t gradient_groups = 16;  // of tiles, each with weight gradients of its own, for any number of threads
constexpr int64_t kept_padding = 16;     // kept states are for sequences in multiples of it: for tiles of any instruction set
// The last row holds the number of lanes that the others are laid out for.
inline int64_t kept_rows(int64_t M) { return (M + kept_padding - 1) / kept_padding * kept_padding + 1; }
// Rows that no tile fills are 0.
template <class T> void mark_lanes(const Tensor& kept, int64_t M) {
  if (!kept.numel()) return;
  T* const values = kept.mutable_data_ptr<T>();
  const int64_t filled = (M + lane_count<T>() - 1) / lane_count<T>() * lane_count<T>() * kept.size(1);
  std::memset(values + filled, 0, (kept.numel() - filled) * sizeof(T));
  values[kept.numel() - kept.size(1)] = T(lane_count<T>());
}
template <class T> void check_lanes(const char* op, const Tensor& kept) {
  if (!kept.numel()) return;
  const T lanes = kept.const_data_ptr<T>()[kept.numel() - kept.size(1)];
  PSF_CHECK(lanes == T(lane_count<T>()), op, ": kept must be for vectors of ", lane_count<T>(), " values, got ", lanes, "; the instruction set has changed");
}

// f(tile, number, this thread's scratch) for all tiles.
template <class T, class F> void for_each_sequence_tile(const Tiles& tiles, int64_t scratch, F f) {
  for_each_group<T>(tiles.count<T>(), scratch, [&](int64_t number, T* memory) { f(tiles.tile<T>(number), number, memory); });
}
// f(tile, number, d, scratch), which adds its weight gradients to d (null if they are not needed); returns their sum.
template <class T, class F> Tensor sum_of_gradients(const Tiles& tiles, int64_t weights, bool needed, TensorOptions options, int64_t scratch, F f) {
  const int64_t count = tiles.count<T>(), groups = std::clamp<int64_t>(count, 1, needed ? gradient_groups : count + 1);
  const Tensor parts = needed ? zeros({groups, weights}, options) : Tensor();
  T* const d = needed ? parts.mutable_data_ptr<T>() : nullptr;
  for_each_group<T>(groups, scratch, [&](int64_t group, T* memory) {
    for (int64_t number = group * count / groups; number < (group + 1) * count / groups; ++number)
      f(tiles.tile<T>(number), number, d ? d + group * weights : nullptr, memory);
  });
  return needed ? sum(parts, {0}) : Tensor();
}

}  // namespace psf
