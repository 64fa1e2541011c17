// The parts of a network on a tile of sequences.
#include "planes.h"

// Whether its planes are those of the products in bfloat16.
template <class T> constexpr bool bf16_planes = PSF_AMX && sizeof(T) == 4 && lanes<T> == 16;

template <class T> void pack_matrix(Weights<T> weights, int64_t weight, int64_t out, int64_t in, int64_t step_out, int64_t step_in, int64_t packed) {
  if constexpr (bf16_planes<T>)
    if (weights.bf16) return pack_bf16(weights.row + weight, out, in, step_out, step_in, weights.packed + packed);
  pack(weights.row + weight, out, in, step_out, step_in, weights.packed + packed);
}
template <class T> void pack_linear(Weights<T> weights, const LinearPart& part, bool back) {
  pack_matrix(weights, part.weight, part.out, part.in, part.step, 1, part.forward);
  if (back) pack_matrix(weights, part.weight, part.in, part.out, 1, part.step, part.back);
}

template <class T> struct NetworkTile {
  static constexpr int64_t L = lanes<T>;
  const Weights<T> weights;
  const Sequences<T>& sequences;
  const TileRegisters registers;
  T *memory, *panel;

  // widest: of all inputs and outputs of its maps. back: with gradients.
  NetworkTile(Weights<T> weights, const Sequences<T>& sequences, T* memory, int64_t widest, bool back)
      : weights(weights), sequences(sequences), registers(weights.bf16), memory(memory), panel(take(panel_vectors(widest, back))) {}
  T* take(int64_t vectors) {
    T* const now = memory;
    memory += vectors * L;
    return now;
  }
  static int64_t panel_vectors(int64_t widest, bool back) {
    const int64_t bf16 = bf16_planes<T> ? bf16_panel(widest, back) : 0;
    return back ? std::max(block_rows * (widest + L), bf16) : bf16;
  }

  const T* at(int64_t offset) const { return weights.row + offset; }
  // y (rows, out) = (or +=, with `add`) x (rows, in) through the map.
  void apply(const LinearPart& part, const T* x, int64_t rows, bool add, T* y, bool bias = true) const {
    multiply(x, part.in, rows, part.forward, bias ? at(part.bias) : nullptr, part.out, add, y);
  }
  // From the gradient of its output to that of its input.
  void turn(const LinearPart& part, const T* dy, int64_t rows, bool add, T* dx) const {
    multiply(dy, part.out, rows, part.back, nullptr, part.in, add, dx);
  }
  // Adds the gradients of its weights, unless d is null.
  void learn(const LinearPart& part, const T* dy, const T* x, int64_t rows, T* d, bool bias = true) const {
    if (!d) return;
    T* const d_bias = bias ? d + part.bias : nullptr;
    if constexpr (bf16_planes<T>)
      if (weights.bf16) return weight_gradient_bf16(dy, part.out * L, x, part.in * L, rows, part.in, part.out, panel, d + part.weight, part.step, d_bias);
    weight_gradient<T>(dy, part.out * L, x, part.in * L, rows, part.in, part.out, panel, d + part.weight, part.step, d_bias);
  }

  // x (M / share, rows, width) -> a plane, repeated in lanes without a sequence and after the end of one; `share` sequences have the same rows, and in a ragged batch some have fewer. all: rows
  // of a sequence in memory, if more than are read.
  void read(const T* x, int64_t rows, int64_t width, T* plane, int64_t share = 1, int64_t all = 0) const {
    int64_t start[L], count[L];
    const int64_t slots = places(rows, width, share, all ? all : rows, start, count);
    for (int l = sequences.count; l < L; ++l) start[l] = start[0], count[l] = count[0];  // what no sequence needs has to be finite
    load_lanes(x, start, count, slots, plane);
    for (int l = 0; sequences.ragged && l < L; ++l)
      for (int64_t i = count[l]; i < slots; ++i) plane[i * L + l] = plane[(i - width) * L + l];  // the last valid row again
  }
  // The same with zeros there: for gradients.
  void read_gradient(const T* dy, int64_t rows, int64_t width, T* plane) const {
    int64_t start[L], count[L];
    const int64_t slots = places(rows, width, 1, rows, start, count);
    load_lanes(dy, start, count, slots, plane);
  }
  void write(T* y, int64_t rows, int64_t width, const T* plane) const {
    int64_t start[L], count[L];
    const int64_t slots = places(rows, width, 1, rows, start, count);
    store_lanes(y, start, count, slots, plane);
  }

 private:
  void multiply(const T* x, int64_t in, int64_t rows, int64_t packed, const T* bias, int64_t out, bool add, T* y) const {
    if constexpr (bf16_planes<T>)
      if (weights.bf16) return linear_bf16(x, in * L, rows, weights.packed + packed, bias, in, out, add, y, out * L, panel);
    linear<T>(x, in * L, rows, weights.packed + packed, bias, in, out, add, y, out * L);
  }
  // Where the values of each lane begin, and how many there are; returns the most.
  int64_t places(int64_t rows, int64_t width, int64_t share, int64_t all, int64_t* start, int64_t* count) const {
    for (int l = 0; l < L; ++l) {
      start[l] = sequences.number[l] / share * all * width;
      count[l] = l < sequences.count ? (sequences.ragged ? sequences.length[l] : rows) * width : 0;
    }
    return (sequences.ragged ? sequences.rows : rows) * width;
  }
};
