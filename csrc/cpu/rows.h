// The one loop of the kernels over samples: (B, S) rows in groups of `lanes`, groups spread over the threads.
#pragma once
#include "../check.h"
#include "tile.h"

#include <algorithm>
#include <atomic>

namespace psf {

// This thread's scratch memory, kept between calls: fresh pages would cost more than the kernels.
template <class T> T* scratch_memory(int64_t count) {
  static thread_local at::Tensor memory;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  if (!memory.defined() || memory.numel() < bytes) memory = at::empty({bytes}, at::kByte);
  return reinterpret_cast<T*>(memory.mutable_data_ptr<uint8_t>());
}

// f(first row, rows in the group, valid nodes of each lane, this thread's scratch of `scratch` numbers of type T).
template <class T, class F>
void for_each_group(int64_t B, int64_t S, int64_t N, const int64_t* num_nodes, int64_t scratch, F f) {
  constexpr int L = 64 / sizeof(T);
  const int64_t groups = (B * S + L - 1) / L;
  const int64_t threads = std::min<int64_t>(groups, at::get_num_threads());
  at::parallel_for(0, groups, (groups + threads - 1) / std::max<int64_t>(threads, 1), [&](int64_t begin, int64_t end) {
    T* memory = scratch_memory<T>(scratch);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * L;
      const int rows = static_cast<int>(std::min<int64_t>(L, B * S - first));
      int64_t count[L];
      for (int l = 0; l < L; ++l) count[l] = num_nodes ? num_nodes[(first + (l < rows ? l : 0)) / S] : N;
      f(first, rows, count, memory);
    }
  });
}

// f(tile, its first row, this thread's scratch of `scratch(slots)` numbers of type T).
template <class T, class Scratch, class F>
void for_each_tile(int64_t B, int64_t S, int64_t N, const int64_t* num_nodes, Scratch scratch, F f) {
  const int segments = row_segments(N, Tile<T>::lanes), step = Tile<T>::lanes / segments;
  const int64_t slots = (N + segments - 1) / segments;
  const int64_t tiles = (B * S + step - 1) / step, threads = std::min<int64_t>(tiles, at::get_num_threads());
  at::parallel_for(0, tiles, (tiles + threads - 1) / std::max<int64_t>(threads, 1), [&](int64_t begin, int64_t end) {
    T* memory = scratch_memory<T>(scratch(slots));
    for (int64_t i = begin; i < end; ++i) {
      Tile<T> tile;
      const int64_t first = i * step;
      tile.N = N;
      tile.segments = segments;
      tile.rows = static_cast<int>(std::min<int64_t>(step, B * S - first));
      for (int row = 0; row < tile.rows; ++row) tile.nodes[row] = num_nodes ? num_nodes[(first + row) / S] : N;
      f(tile.with_slots(slots), first, memory);
    }
  });
}

}  // namespace psf
