// The team for a row, and the memory it needs.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "rows.h"

namespace psf::cuda {

// The team for rows of N: K slots a thread in registers, or `slots` in memory if K is 0.
struct Shape {
  int K, threads, slots;
};
constexpr int most_threads = warp_size * most_warps, most_slots_in_registers = 4 * most_threads;

inline Shape shape_of(int64_t N) {
  for (const int K : {1, 2, 4, 6, 8})
    if (N <= K * warp_size) return {K, warp_size, K};
  if (N <= most_slots_in_registers) return {4, N <= most_slots_in_registers / 2 ? most_threads / 2 : most_threads, 4};
  return {0, most_threads, static_cast<int>((N + most_threads - 1) / most_threads)};
}

// f(K, whether the team has many warps), as constants.
template <class F> auto with_shape(const Shape& shape, F f) {
  using std::bool_constant, std::integral_constant;
  if (shape.K == 0) return f(integral_constant<int, 0>{}, bool_constant<true>{});
  if (shape.threads > warp_size) return f(integral_constant<int, 4>{}, bool_constant<true>{});
  switch (shape.K) {
    case 1: return f(integral_constant<int, 1>{}, bool_constant<false>{});
    case 2: return f(integral_constant<int, 2>{}, bool_constant<false>{});
    case 4: return f(integral_constant<int, 4>{}, bool_constant<false>{});
    case 6: return f(integral_constant<int, 6>{}, bool_constant<false>{});
    default: return f(integral_constant<int, 8>{}, bool_constant<false>{});
  }
}

// Blocks, and bytes per block: in shared memory, and in a workspace that starts with the arena.
struct Plan {
  Shape shape;
  int blocks;
  int64_t shared_bytes, arena_bytes, workspace_bytes;
};
constexpr int64_t most_shared_bytes = 40 << 10;      // plus the kernel's own, within every device's default limit
constexpr int64_t most_workspace_bytes = 256 << 20;  // if all rows at once need more, each block runs several rows in turn

template <class P> Plan plan_with(const Shape& shape, const P& p) {
  using T = typename P::Number;
  Plan plan{shape, 0, 0, 0, 0};
  const int64_t saved = saved_numbers(p, shape.slots) * shape.threads * static_cast<int64_t>(sizeof(T));
  if (shape.K == 0) plan.arena_bytes = (memory_bytes(p, shape.slots, shape.threads) + 15) / 16 * 16;
  const bool shared = shape.K > 0 && saved <= most_shared_bytes;
  plan.shared_bytes = shared ? saved : 0;
  plan.workspace_bytes = plan.arena_bytes + (shared ? 0 : (saved + 15) / 16 * 16);
  int64_t blocks = p.rows < INT32_MAX ? p.rows : INT32_MAX;
  if (plan.workspace_bytes > 0) {
    const int64_t fit = most_workspace_bytes / plan.workspace_bytes;
    blocks = blocks < fit ? blocks : fit > 1 ? fit : 1;
  }
  plan.blocks = static_cast<int>(blocks);
  return plan;
}
template <class P> Plan plan_of(const P& p) { return plan_with(shape_of(p.N), p); }

}  // namespace psf::cuda
