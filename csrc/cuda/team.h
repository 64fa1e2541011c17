// A team of threads that shares a sample, and each thread's part of it. The team is a warp, or the warps of a block. Thread
// i holds the neighbouring slots i K to (i + 1) K - 1 of the row in registers. With K = 0 they are in memory, and rows may
// have any length.
#pragma once
#include "device.h"

namespace psf::cuda {

constexpr int warp_size = 32, warp_steps = 5, most_warps = 8;

// A thread's `count` values: in registers, or in memory, interleaved over the threads.
template <class T, int K> struct Slots {
  T x[K];
  PSF_STEP T& operator[](int i) { return x[i]; }
  PSF_STEP const T& operator[](int i) const { return x[i]; }
};
template <class T> struct Slots<T, 0> {
  T* x;
  int stride;
  PSF_STEP T& operator[](int i) const { return x[static_cast<int64_t>(i) * stride]; }
};

// Allocates from a block's memory; discarding a copy frees what the copy allocated.
struct Arena {
  char* memory;
  int threads, thread;
  template <class T, int K> PSF_STEP Slots<T, K> slots(int count) {
    if constexpr (K > 0) {
      return {};
    } else {
      T* const x = reinterpret_cast<T*>(memory) + thread;
      memory += bytes(count, sizeof(T), threads);
      return {x, threads};
    }
  }
  static PSF_BOTH int64_t bytes(int64_t count, int64_t size, int threads) { return count * size * threads; }
};

// What the warps of a block exchange. Each use takes the half that the last use did not, so one barrier between writing and
// reading is enough.
template <class T> struct Shared {
  T carry[2][2][3][most_warps];
  T part[2][most_warps];
  T key[2][most_warps * warp_size];
  int index[2][most_warps * warp_size];
  T decay[2][most_warps], distance[2][most_warps];  // across a whole warp, from the left and from the right
};

template <class T> struct Keyed {
  T key;
  int index;
};

template <class Thread, class T, bool many_warps> struct Team {
  static constexpr bool many = many_warps;
  Thread thread;
  Shared<T>* shared;
  int turn = 0;

  PSF_STEP int index() const { return thread.index(); }
  PSF_STEP int size() const { return many ? thread.count() : warp_size; }
  PSF_STEP int lane() const { return many ? thread.index() % warp_size : thread.index(); }
  PSF_STEP int warp() const { return many ? thread.index() / warp_size : 0; }
  PSF_STEP int warps() const { return many ? thread.count() / warp_size : 1; }

  PSF_STEP void sync() const {
    if constexpr (many)
      thread.sync_block();
    else
      thread.sync_warp();
  }

  // In every thread x of all threads joined, in the same order in each of them.
  template <class Join> PSF_STEP T all(T x, Join join) {
    for (int mask = warp_size / 2; mask > 0; mask /= 2) x = join(x, thread.shuffle_xor(x, mask));
    if constexpr (many) {
      T* const part = shared->part[turn];
      turn ^= 1;
      if (lane() == 0) part[warp()] = x;
      sync();
      x = part[0];
      for (int w = 1; w < warps(); ++w) x = join(x, part[w]);
    }
    return x;
  }
  PSF_STEP T sum(T x) {
    return all(x, [](T a, T b) { return a + b; });
  }
  PSF_STEP T largest(T x) {
    return all(x, [](T a, T b) { return a > b ? a : b; });
  }

  // The entry of the thread whose index differs by `mask`, a power of two.
  PSF_STEP Keyed<T> exchange(const Keyed<T>& x, int mask) {
    if (!many || mask < warp_size) return {thread.shuffle_xor(x.key, mask), thread.shuffle_xor(x.index, mask)};
    T* const key = shared->key[turn];
    int* const number = shared->index[turn];
    turn ^= 1;
    key[index()] = x.key;
    number[index()] = x.index;
    sync();
    return {key[index() ^ mask], number[index() ^ mask]};
  }
};

// u before v: the larger key, with equal keys the lower index. Keys are no NaN. Both sides of | and & are evaluated: with ||
// and && each compare would be a branch that divides a warp.
template <class T> PSF_STEP bool precedes(const Keyed<T>& u, const Keyed<T>& v) {
  return (u.key > v.key) | ((u.key == v.key) & (u.index < v.index));
}

// Puts the entries of slots i and j of this thread in order (forward), or in reverse order.
template <class T, int K> PSF_STEP void compare(Slots<T, K>& key, Slots<int, K>& index, int i, int j, bool forward) {
  const Keyed<T> u{key[i], index[i]}, v{key[j], index[j]};
  const bool keep = precedes(u, v) == forward;
  key[i] = keep ? u.key : v.key;
  index[i] = keep ? u.index : v.index;
  key[j] = keep ? v.key : u.key;
  index[j] = keep ? v.index : u.index;
}

// Sorts the team's size * K slots, K a power of two, by merging ever longer bitonic runs.
template <int K, class T, class Team> PSF_STEP void sort(Team& team, Slots<T, K>& key, Slots<int, K>& index, int count) {
  const int k = K > 0 ? K : count, first = team.index() * k, total = team.size() * k;
  PSF_UNROLLED
  for (int size = 2; size <= k; size *= 2)
    PSF_UNROLLED
    for (int distance = size / 2; distance > 0; distance /= 2)
      PSF_UNROLLED
      for (int i = 0; i < k; ++i)
        if ((i & distance) == 0) compare<T, K>(key, index, i, i ^ distance, ((first + i) & size) == 0);
  PSF_ROLLED
  for (int size = 2 * k; size <= total; size *= 2) {
    const bool forward = (first & size) == 0;
    PSF_ROLLED
    for (int mask = size / 2 / k; mask > 0; mask /= 2) {
      const bool want_first = ((team.index() & mask) == 0) == forward;
      PSF_UNROLLED
      for (int i = 0; i < k; ++i) {
        const Keyed<T> mine{key[i], index[i]}, other = team.exchange(mine, mask);
        const bool keep = precedes(mine, other) == want_first;
        key[i] = keep ? mine.key : other.key;
        index[i] = keep ? mine.index : other.index;
      }
    }
    PSF_UNROLLED
    for (int distance = k / 2; distance > 0; distance /= 2)
      PSF_UNROLLED
      for (int i = 0; i < k; ++i)
        if ((i & distance) == 0) compare<T, K>(key, index, i, i ^ distance, forward);
  }
}

}  // namespace psf::cuda
