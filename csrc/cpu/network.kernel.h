// The parts of a network on a tile of sequences.
#include "planes.h"

template <class T> void pack_linear(Weights<T> weights, const LinearPart& part, bool back) {
  pack(weights.row + part.weight, part.out, part.in, part.step, 1, weights.packed + part.forward);
  if (back) pack(weights.row + part.weight, part.in, part.out, 1, part.step, weights.packed + part.back);
}

template <class T> struct NetworkTile {
  static constexpr int64_t L = lanes<T>;
  const Weights<T> weights;
  const Sequences<T>& sequences;
  T *memory, *panel = nullptr;

  NetworkTile(Weights<T> weights, const Sequences<T>& sequences, T* memory) : weights(weights), sequences(sequences), memory(memory) {}
  T* take(int64_t vectors) {
    T* const now = memory;
    memory += vectors * L;
    return now;
  }
  static int64_t panel_vectors(int64_t widest) { return block_rows * (widest + L); }

  const T* at(int64_t offset) const { return weights.row + offset; }
  // y (rows, out) = (or +=, with `add`) x (rows, in) through the map.
  void apply(const LinearPart& part, const T* x, int64_t rows, bool add, T* y, bool bias = true) const {
    linear<T>(x, part.in * L, rows, weights.packed + part.forward, bias ? at(part.bias) : nullptr, part.in, part.out, add, y, part.out * L);
  }
  // From the gradient of its output to that of its input.
  void turn(const LinearPart& part, const T* dy, int64_t rows, bool add, T* dx) const {
    linear<T>(dy, part.out * L, rows, weights.packed + part.back, nullptr, part.out, part.in, add, dx, part.in * L);
  }
  // Adds the gradients of its weights, unless d is null.
  void learn(const LinearPart& part, const T* dy, const T* x, int64_t rows, T* d, bool bias = true) const {
    if (d) weight_gradient<T>(dy, part.out * L, x, part.in * L, rows, part.in, part.out, panel, d + part.weight, part.step, bias ? d + part.bias : nullptr);
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
  // Where the values of each lane begin, and how many there are; returns the most.
  int64_t places(int64_t rows, int64_t width, int64_t share, int64_t all, int64_t* start, int64_t* count) const {
    for (int l = 0; l < L; ++l) {
      start[l] = sequences.number[l] / share * all * width;
      count[l] = l < sequences.count ? (sequences.ragged ? sequences.length[l] : rows) * width : 0;
    }
    return (sequences.ragged ? sequences.rows : rows) * width;
  }
};
