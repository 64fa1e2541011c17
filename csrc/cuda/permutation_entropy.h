// One sample of permutation_entropy, forward and backward, by a team of threads. A normalised row of P[i, j] = r_i K_ij c_j
// does not depend on r: p_ij = K_ij c_j / m_i with m = K c; columns are the same with r in place of c. With l = log v,
// D the scaled distances and q = K(v l) - (D o K) v:   H_i = log m_i - q_i / m_i.
#pragma once
#include "laplace.h"
#include "rows.h"

namespace psf::cuda {

template <class T> int64_t memory_bytes(const PermutationEntropy<T>&, int64_t slots, int threads) {
  return (6 * slots + 2) * static_cast<int64_t>(sizeof(T)) * threads;
}
template <class T> int64_t memory_bytes(const PermutationEntropyBackward<T>&, int64_t slots, int threads) {
  return (8 * slots + 2) * static_cast<int64_t>(sizeof(T)) * threads;
}

// Scans of pair(i) = (p_i, q_i) over the row: down(i, scan) for all slots with the scans from the right up to slot i, then
// up(i, scan) with those from the left.
template <class T, class Kernel, class Pair, class Down, class Up>
PSF_STEP void scan_both_ways(Kernel& kernel, Pair pair, Down down, Up up) {
  const int k = kernel.k();
  FarSums<T> f{}, b{};
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const int j = k - 1 - i;
    const auto x = pair(i), y = pair(j);
    f.step(kernel.a[i], kernel.d[i], x.p, x.q);
    b.step(kernel.a[j + 1], kernel.d[j + 1], y.p, y.q);
  }
  kernel.enter(f, b);
  PSF_UNROLLED
  for (int i = k - 1; i >= 0; --i) {
    const auto x = pair(i);
    b.step(kernel.a[i + 1], kernel.d[i + 1], x.p, x.q);
    down(i, b);
  }
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const auto x = pair(i);
    f.step(kernel.a[i], kernel.d[i], x.p, x.q);
    up(i, f);
  }
}
template <class T> struct Pair {
  T p, q;
};

template <int K, class T, class Team>
PSF_STEP void compute_row(Team& team, Arena arena, T*, const PermutationEntropy<T>& p, int64_t row, int slots) {
  const int n = valid_nodes(p, row), k = K > 0 ? K : slots;
  const int64_t at = row * p.N, first = static_cast<int64_t>(team.index()) * k;
  Laplace<Team, T, K, true> kernel(team, arena, p.t + at, n, k, T(1) / p.tau);
  Slots<T, K> l = arena.slots<T, K>(k), v = arena.slots<T, K>(k), m = arena.slots<T, K>(k), q = arena.slots<T, K>(k);
  T sum = 0;
  PSF_ROLLED
  for (int side = 0; side < 2; ++side) {
    load_slots<K>(l, (side ? p.log_r : p.log_c) + at, first, n, k, T(0));
    PSF_UNROLLED
    for (int i = 0; i < k; ++i) v[i] = exponential(l[i]);
    scan_both_ways<T>(
        kernel, [&](int i) { return Pair<T>{v[i], v[i] * l[i]}; },
        [&](int i, const FarSums<T>& b) {
          m[i] = b.p - v[i];
          q[i] = b.q - b.far - v[i] * l[i];
        },
        [&](int i, const FarSums<T>& f) {
          const T mi = m[i] + f.p;
          sum += row_entropy(logarithm(mi), q[i] + f.q - f.far, T(1) / mi);
        });
  }
  sum = team.sum(sum);
  if (team.index() == 0) p.sums[row] = static_cast<double>(sum) / (static_cast<double>(n) * static_cast<double>(p.rows));
}

// With alpha = 1 / m, beta = -q / m^2 and w the gradient of the row's sum:
//   d l = -w v (l K alpha - (D o K) alpha + K beta)
//   d t = w (alpha (sgnK (v l) - sgnDK v) + beta sgnK v + v (l sgnK alpha - sgnDK alpha + sgnK beta)) / tau
template <int K, class T, class Team>
PSF_STEP void compute_row(Team& team, Arena arena, T*, const PermutationEntropyBackward<T>& p, int64_t row, int slots) {
  const int n = valid_nodes(p, row), k = K > 0 ? K : slots;
  const int64_t at = row * p.N, first = static_cast<int64_t>(team.index()) * k;
  const T weight = static_cast<T>(static_cast<double>(*p.d_entropy) / (static_cast<double>(n) * static_cast<double>(p.rows)));
  Laplace<Team, T, K, true> kernel(team, arena, p.t + at, n, k, T(1) / p.tau);
  Slots<T, K> l = arena.slots<T, K>(k), v = arena.slots<T, K>(k), alpha = arena.slots<T, K>(k), beta = arena.slots<T, K>(k),
              down = arena.slots<T, K>(k), dt = arena.slots<T, K>(k);
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) dt[i] = T(0);
  PSF_ROLLED
  for (int side = 0; side < 2; ++side) {
    load_slots<K>(l, (side ? p.log_r : p.log_c) + at, first, n, k, T(0));
    PSF_UNROLLED
    for (int i = 0; i < k; ++i) v[i] = exponential(l[i]);
    scan_both_ways<T>(
        kernel, [&](int i) { return Pair<T>{v[i], v[i] * l[i]}; },
        [&](int i, const FarSums<T>& b) {
          alpha[i] = b.p;
          beta[i] = b.q - b.far;
        },
        [&](int i, const FarSums<T>& f) {
          const T b_p = alpha[i], b_q = beta[i], f_q = f.q - f.far;
          const T al = T(1) / (f.p + b_p - v[i]), be = row_entropy_beta(f_q + b_q - v[i] * l[i], al);
          dt[i] += al * (b_q - f_q) + be * (b_p - f.p);
          alpha[i] = al;
          beta[i] = be;
        });
    T* const d_log = (side ? p.d_log_r : p.d_log_c) + at;
    scan_both_ways<T>(
        kernel, [&](int i) { return Pair<T>{alpha[i], beta[i]}; },
        [&](int i, const FarSums<T>& b) { down[i] = l[i] * b.p - b.far + b.q; },
        [&](int i, const FarSums<T>& f) {
          const T up = l[i] * f.p - f.far + f.q;
          dt[i] += v[i] * (down[i] - up);
          if (first + i < p.N)
            d_log[first + i] = first + i < n ? -weight * v[i] * (up + down[i] - l[i] * alpha[i] - beta[i]) : T(0);
        });
  }
  const T scale = weight / p.tau;
  PSF_UNROLLED
  for (int i = 0; i < k; ++i)
    if (first + i < p.N) p.d_t[at + first + i] = first + i < n ? dt[i] * scale : T(0);
}

}  // namespace psf::cuda
