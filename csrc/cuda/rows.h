// How a team reads the rows (B, S, N) of slots or nodes.
#pragma once
#include "arguments.h"
#include "team.h"

namespace psf::cuda {

// Valid nodes of a row. Values are not checked on the GPU: counts out of range are clamped, for memory safety.
template <class P> PSF_STEP int valid_nodes(const P& p, int64_t row) {
  const int64_t n = p.num_nodes ? p.num_nodes[row / p.S] : p.N;
  return static_cast<int>(n < 0 ? 0 : n > p.N ? p.N : n);
}

// What an op needs of a block's memory; each op adds its own overload.
// saved_numbers: values that a thread saves between the passes. memory_bytes: of the arena, if K is 0.
template <class P> int64_t saved_numbers(const P&, int64_t) { return 0; }

// A thread's slots of a row, starting at `first`.
template <int K, class T> PSF_STEP void load_slots(Slots<T, K>& x, const T* row, int64_t first, int n, int k, T beyond) {
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) x[i] = first + i < n ? row[first + i] : beyond;
}

template <int K> void compute_row() = delete;  // the name of a template; every op overloads it

// The block takes rows first, first + step, ... The next row uses the memory of the last one.
template <int K, class Team, class T, class P>
PSF_STEP void compute_rows(Team& team, const Arena& arena, T* saved, const P& p, int slots, int64_t first, int64_t step) {
  for (int64_t row = first; row < p.rows; row += step) {
    compute_row<K>(team, arena, saved, p, row, slots);
    team.sync();
  }
}

}  // namespace psf::cuda
