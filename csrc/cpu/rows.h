// The kernels' loop over samples: (B, S) rows in groups that fill the lanes, with groups spread over the threads.
#pragma once
#include "../check.h"
#include "isa.h"
#include "tile.h"

#include <algorithm>
#include <atomic>

namespace psf {

// This thread's scratch memory, kept between calls, since fresh pages would cost more than the kernels.
template <class T> T* scratch_memory(int64_t count) {
  static thread_local Tensor memory;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  if (!memory.defined() || memory.numel() < bytes) memory = empty({bytes}, {kByte, cpu()});
  return reinterpret_cast<T*>(memory.mutable_data_ptr<uint8_t>());
}

// Spreads `groups` of rows over the threads: f(group, this thread's scratch of `scratch` values of type T).
template <class T, class F> void for_each_group(int64_t groups, int64_t scratch, F f) {
  const int64_t threads = std::clamp<int64_t>(groups, 1, get_num_threads());
  parallel_for(0, groups, (groups + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    T* memory = scratch_memory<T>(scratch);
    for (int64_t group = begin; group < end; ++group) f(group, memory);
  });
}

// f(first row, rows in the group, scratch of `scratch` values per lane): M rows, one per lane.
template <class T, class F> void for_each_lane(int64_t M, int64_t scratch, F f) {
  const int64_t L = lane_count<T>();
  for_each_group<T>((M + L - 1) / L, scratch * L, [&](int64_t group, T* memory) {
    f(group * L, static_cast<int>(std::min<int64_t>(L, M - group * L)), memory);
  });
}

// f(tile, its first row, scratch of `scratch(slots)` values per lane): (B, S) rows of N nodes.
template <class T, class Scratch, class F>
void for_each_tile(int64_t B, int64_t S, int64_t N, const int64_t* num_nodes, Scratch scratch, F f) {
  const int L = lane_count<T>(), segments = row_segments(N, L), step = L / segments;
  const int64_t slots = (N + segments - 1) / segments;
  for_each_group<T>((B * S + step - 1) / step, scratch(slots) * L, [&](int64_t group, T* memory) {
    Tile<T> tile;
    const int64_t first = group * step;
    tile.N = N;
    tile.segments = segments;
    tile.rows = static_cast<int>(std::min<int64_t>(step, B * S - first));
    for (int row = 0; row < tile.rows; ++row) tile.nodes[row] = num_nodes ? num_nodes[(first + row) / S] : N;
    f(tile.with_slots(slots), first, memory);
  });
}

}  // namespace psf
