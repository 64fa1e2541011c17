// The soft permutation of a tile of samples: sort, Sinkhorn scaling, and the gradient of both.
#include "laplace.h"

// u before v: the larger key, with equal keys the lower index.
template <class T> struct Keyed {
  Vec<T> key;
  IntVec<T> index;
};
template <class T> inline Keyed<T> load_keyed(const T* key, const typename Lanes<T>::Int* index) { return {load(key), load(index)}; }
template <class T> inline void store_keyed(T* key, typename Lanes<T>::Int* index, const Keyed<T>& x) {
  store(key, x.key);
  store(index, x.index);
}
template <class T> inline IntVec<T> precedes(const Keyed<T>& u, const Keyed<T>& v) {
  return (u.key > v.key) | ((u.key == v.key) & (u.index < v.index));
}
template <class T> inline Keyed<T> choose(IntVec<T> mask, const Keyed<T>& u, const Keyed<T>& v) {
  return {mask ? u.key : v.key, mask ? u.index : v.index};
}
template <int x, class T> inline Keyed<T> exchange(const Keyed<T>& u) { return {exchange<x>(u.key), exchange<x>(u.index)}; }

// Puts the entries of slots i and i + distance in order.
template <class T> inline void compare(T* key, typename Lanes<T>::Int* index, int64_t i, int64_t distance) {
  constexpr int L = lanes<T>;
  const int64_t x = i * L, y = (i + distance) * L;
  const Keyed<T> u = load_keyed<T>(key + x, index + x), v = load_keyed<T>(key + y, index + y);
  const IntVec<T> keep = precedes<T>(u, v);
  store_keyed<T>(key + x, index + x, choose<T>(keep, u, v));
  store_keyed<T>(key + y, index + y, choose<T>(keep, v, u));
}

// Sorts every lane's n = 2^k slots with Batcher's merge exchange: the same comparisons in every lane.
template <class T> inline void sort_lanes(T* key, typename Lanes<T>::Int* index, int64_t n) {
  for (int64_t p = n / 2; p > 0; p /= 2) {
    int64_t distance = p, offset = 0;
    for (int64_t q = n / 2;; q /= 2) {
      for (int64_t block = offset; block + distance < n; block += 2 * p)
        for (int64_t i = block; i < block + p && i + distance < n; ++i) compare<T>(key, index, i, distance);
      if (q == p) break;
      distance = q - p;
      offset = p;
    }
  }
}

// In every pair of lanes l, l ^ x the earlier of u and its partner goes to the lane without the bit `low`.
template <int x, int low, class T> inline Keyed<T> exchange_ordered(const Keyed<T>& u, const Keyed<T>& partner, IntVec<T> lane) {
  const Keyed<T> v = exchange<x, T>(partner);
  const IntVec<T> keep = precedes<T>(u, v);
  return choose<T>((lane & low) == 0, choose<T>(keep, u, v), choose<T>(keep, v, u));
}

template <int w, class T> inline void halve_across(T* key, typename Lanes<T>::Int* index, int64_t n, IntVec<T> lane) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < n; ++i) {
    const Keyed<T> u = load_keyed<T>(key + i * L, index + i * L);
    store_keyed<T>(key + i * L, index + i * L, exchange_ordered<w, w, T>(u, u, lane));
  }
  if constexpr (w > 1) halve_across<w / 2, T>(key, index, n, lane);
}

// Merges sorted runs of w lanes in pairs (bitonic: the second run backwards, then halves), until they are `segments` wide.
template <int w, class T>
inline void merge_runs(T* key, typename Lanes<T>::Int* index, int64_t n, int segments, IntVec<T> lane) {
  constexpr int L = lanes<T>;
  if (w >= segments) return;
  for (int64_t i = 0; i < (n + 1) / 2; ++i) {
    const int64_t x = i * L, y = (n - 1 - i) * L;
    const Keyed<T> u = load_keyed<T>(key + x, index + x), v = load_keyed<T>(key + y, index + y);
    store_keyed<T>(key + x, index + x, exchange_ordered<2 * w - 1, w, T>(u, v, lane));
    store_keyed<T>(key + y, index + y, exchange_ordered<2 * w - 1, w, T>(v, u, lane));
  }
  if constexpr (w > 1) halve_across<w / 2, T>(key, index, n, lane);
  for (int64_t distance = n / 2; distance > 0; distance /= 2)
    for (int64_t block = 0; block < n; block += 2 * distance)
      for (int64_t i = block; i < block + distance; ++i) compare<T>(key, index, i, distance);
  if constexpr (w < 4 && 4 * w <= lanes<T>) merge_runs<2 * w, T>(key, index, n, segments, lane);
}

inline int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// sqrt(sum of squares) of each row's valid scores, at least 1e-6; ones if scores are not normalised.
template <class T> inline Vec<T> norms(const Tile<T>& tile, const T* scores, bool normalize) {
  if (!normalize) return splat<T>(1);
  Vec<T> top{}, sum{};
  for (int64_t j = 0; j < tile.slots; ++j) {
    const Vec<T> s = load(scores + j * lanes<T>), size = s < T(0) ? -s : s;
    top = size > top ? size : top;
  }
  top = row_largest<T>(tile, top);
  const Vec<T> scale = top > T(1e-6) ? top : splat<T>(1);  // squares of scaled scores do not overflow
  for (int64_t j = 0; j < tile.slots; ++j) {
    const Vec<T> s = load(scores + j * lanes<T>) / scale;
    sum += s * s;
  }
  Vec<T> norm = row_sums<T>(tile, sum);
  for (int l = 0; l < lanes<T>; ++l) norm[l] = std::sqrt(norm[l]);
  norm *= scale;
  return norm < T(1e-6) ? splat<T>(T(1e-6)) : norm;
}

template <class T> inline bool all_finite(const T* x, int64_t n) {
  Vec<T> bad{};
  for (int64_t j = 0; j < n; ++j) bad += load(x + j * lanes<T>) * T(0);  // NaN where x is NaN or infinite
  bool finite = true;
  for (int l = 0; l < lanes<T>; ++l) finite &= bad[l] == T(0);
  return finite;
}

// --- long rows: one at a time, by radix ---

constexpr int64_t radix_from = 2048;  // nodes: a network's steps grow as n log(n)^2

template <class T> struct Digits {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  struct Entry {
    Bits key;
    typename Lanes<T>::Int index;
  };
  static constexpr int bits = 11, count = (8 * sizeof(T) + bits - 1) / bits;
  static int64_t at(Bits key, int d) { return key >> bits * d & ((1 << bits) - 1); }
  static constexpr Bits sign = Bits(1) << (8 * sizeof(T) - 1);
  // In ascending order where finite values descend; both zeros are one.
  static Bits key(T x) {
    Bits bits;
    x += T(0);
    std::memcpy(&bits, &x, sizeof(T));
    return bits & sign ? bits : ~(bits | sign);
  }
};

// Sorts n scaled scores in descending order, equal ones by index. memory: 2 n entries.
template <class T>
inline void radix_sort(const T* scores, T norm, int64_t n, typename Digits<T>::Entry* memory, T* t, int64_t* order, int64_t* rank) {
  using D = Digits<T>;
  typename D::Entry *from = memory, *to = memory + n;
  int32_t places[D::count][1 << D::bits] = {};
  for (int64_t i = 0; i < n; ++i) {
    const auto key = D::key(scores[i] / norm);
    from[i] = {key, static_cast<typename Lanes<T>::Int>(i)};
    for (int d = 0; d < D::count; ++d) ++places[d][D::at(key, d)];
  }
  for (int d = 0; d < D::count; ++d) {
    if (places[d][D::at(from[0].key, d)] == n) continue;  // all alike
    int32_t next = 0;
    for (int32_t& place : places[d]) next += std::exchange(place, next);
    for (int64_t i = 0; i < n; ++i) to[places[d][D::at(from[i].key, d)]++] = from[i];
    std::swap(from, to);
  }
  for (int64_t j = 0; j < n; ++j) {
    const int64_t u = from[j].index;
    t[j] = scores[u] / norm;
    order[j] = u;
    rank[u] = j;
  }
}

inline int64_t soft_permutation_scratch(int64_t slots) { return 10 * (slots + 1); }  // values a lane

// t and order of the tile's rows, row-major. presorted: their scores descend already. Returns false if a valid score is not finite.
template <class T>
inline bool sort_rows(const Tile<T>& tile, const T* scores, bool normalize, bool presorted, T* key, T* t, int64_t* order, int64_t* rank) {
  constexpr int L = lanes<T>;
  using Int = typename Lanes<T>::Int;
  const Tile<T> wide = tile.with_slots(power_of_two(tile.slots));
  const int64_t n = wide.slots;
  Int *index = reinterpret_cast<Int*>(key + n * L), *rows = index + n * L;
  load_tile(wide, scores, key);
  if (!all_finite(key, n)) return false;

  IntVec<T> lane, node;
  Vec<T> valid;
  for (int l = 0; l < L; ++l) {
    lane[l] = l;
    node[l] = static_cast<Int>(l % tile.segments * n);
    valid[l] = static_cast<T>(wide.count[l]);
  }
  const Vec<T> norm = norms(wide, key, normalize);
  const auto identity = [&](int row, int64_t first) {
    for (int64_t j = first; j < tile.N; ++j) order[row * tile.N + j] = rank[row * tile.N + j] = j;
  };
  if (presorted) {
    for (int64_t j = 0; j < n; ++j) store(key + j * L, load(key + j * L) / norm);
    store_tile(wide, t, key);
    for (int row = 0; row < tile.rows; ++row) identity(row, 0);
    return true;
  }
  if (tile.N >= radix_from) {
    auto* const memory = reinterpret_cast<typename Digits<T>::Entry*>(key);  // two values each
    for (int row = 0; row < tile.rows; ++row) {
      const int64_t at = row * tile.N, valid = tile.nodes[row];
      radix_sort<T>(scores + at, norm[row * tile.segments], valid, memory, t + at, order + at, rank + at);
      std::fill(t + at + valid, t + at + tile.N, T(0));
      identity(row, valid);
    }
    return true;
  }
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> s = load(key + j * L) / norm;
    store(key + j * L, splat<T>(static_cast<T>(j)) < valid ? s : splat<T>(-INFINITY));
    store(index + j * L, node + static_cast<Int>(j));
  }
  sort_lanes<T>(key, index, n);
  merge_runs<1, T>(key, index, n, tile.segments, lane);
  store_tile(wide, t, key);
  store_lanes(rows, wide.start, wide.count, n, index);
  for (int row = 0; row < tile.rows; ++row) {
    const int64_t at = row * tile.N;
    for (int64_t j = 0; j < tile.nodes[row]; ++j) {
      const int64_t u = rows[at + j];
      order[at + j] = u;
      rank[at + u] = j;
    }
    identity(row, tile.nodes[row]);
  }
  return true;
}

template <class T>
void soft_permutation_lanes(const Tile<T>& tile, const T* scores, T tau, int iterations, bool normalize, bool presorted,
                            T* scratch, int64_t* order, int64_t* rank, T* t_out, T* log_r, T* log_c, bool* finite) {
  constexpr int L = lanes<T>;
  const int64_t step = (tile.slots + 1) * L;
  *finite = sort_rows(tile, scores, normalize, presorted, scratch, t_out, order, rank);
  if (!*finite) return;
  T *t = scratch, *scan = t + step, *c = scan + step, *r = c + step;
  load_tile(tile, t_out, t);
  const Laplace<T> K(tile, t, tau, r + step);
  sinkhorn<false>(K, iterations, c, step, scan);
  for (int64_t j = 0; j < tile.slots; ++j) {
    store(r + j * L, log_positive<T>(load(r + j * L)));
    store(c + j * L, log_positive<T>(load(c + j * L)));
  }
  store_tile(tile, log_r, r);
  store_tile(tile, log_c, c);
}

inline int64_t soft_permutation_backward_scratch(int64_t slots, int iterations) {
  return (13 + 4 * iterations) * (slots + 1);
}

// Backward of x_m = 1 / (K x) with x = x_{m-1}: from w = x_m dL/dx_m to that of x, and adds the gradient of t through K.
template <class T, bool last> struct InvertBackward {
  const T *x, *sgn_x, *d_log_x;  // d_log_x: the gradient of log x from outside, if m is the last
  T* dt;
  __attribute__((always_inline)) Vec<T> operator()(int64_t i, Vec<T> w, Vec<T> Kw, Vec<T> sgn_w) const {
    const Vec<T> xi = load(x + i);
    store(dt + i, load(dt + i) + inverse_by_t(xi, load(sgn_x + i), w, sgn_w));
    const Vec<T> d_log = inverse_by_log(xi, Kw);
    return (last ? load(d_log_x + i) + d_log : d_log) * xi;
  }
};

template <class T>
void soft_permutation_backward_lanes(const Tile<T>& tile, const T* d_t, const T* d_log_r, const T* d_log_c, const T* scores,
                                     const int64_t* order, const T* t_in, T tau, int iterations, bool normalize, T* scratch,
                                     T* d_scores) {
  constexpr int L = lanes<T>;
  const int64_t n = tile.slots, step = (n + 1) * L;
  T *t = scratch, *scan = t + step, *rho = scan + step, *w = rho + step, *dt = w + step, *rest = dt + step;
  load_tile(tile, t_in, t);
  const Laplace<T> K(tile, t, tau, rest);
  T* vectors = rest + laplace_arrays * step;
  sinkhorn<true>(K, iterations, vectors, 2 * step, scan);

  load_tile(tile, d_log_r, rho);
  load_tile(tile, d_log_c, w);
  for (int64_t i = 0; i < n; ++i) {
    store(w + i * L, load(w + i * L) * load(vectors + 2 * iterations * 2 * step + i * L));
    store(dt + i * L, Vec<T>{});
  }
  if (iterations > 0) {
    Scanned<T> x{w, scan, {}, {}};
    begin(K, x);
    for (int m = 2 * iterations - 1; m > 0; m -= 2) {
      const T *r = vectors + m * 2 * step, *c = r - 2 * step;
      if (m == 2 * iterations - 1) {
        pass<true>(K, x, w, InvertBackward<T, true>{r, r + step, rho, dt});
      } else {
        pass<true>(K, x, w, InvertBackward<T, false>{r, r + step, nullptr, dt});
      }
      pass<false>(K, x, w, InvertBackward<T, false>{c, c + step, nullptr, dt});
    }
  }

  // t = s / norm: d_s = (d_t - t <t, d_t>) / norm, without the second term if the norm is clamped.
  load_tile(tile, d_t, w);
  load_tile(tile, scores, scan);
  const Vec<T> norm = norms(tile, scan, normalize), by_tau = splat<T>(1) / splat<T>(tau);
  Vec<T> inner{};
  for (int64_t i = 0; i < n; ++i) {
    const Vec<T> d = load(w + i * L) + load(dt + i * L) * by_tau;
    inner += d * load(t + i * L);
    store(dt + i * L, d);
  }
  inner = row_sums<T>(tile, inner);
  if (!normalize) inner = Vec<T>{};
  inner = norm > T(1e-6) ? inner : Vec<T>{};
  for (int64_t i = 0; i < n; ++i) store(dt + i * L, (load(dt + i * L) - load(t + i * L) * inner) / norm);
  T* sorted = rest;  // row-major
  store_lanes(sorted, tile.start, tile.count, n, dt);
  for (int row = 0; row < tile.rows; ++row) {
    const int64_t at = row * tile.N;
    std::fill_n(d_scores + at, tile.N, T(0));
    for (int64_t j = 0; j < tile.nodes[row]; ++j) d_scores[at + order[at + j]] = sorted[at + j];
  }
}
