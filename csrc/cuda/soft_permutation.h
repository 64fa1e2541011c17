// One sample of soft_permutation, forward and backward, by a team of threads.
#pragma once
#include "laplace.h"
#include "rows.h"

namespace psf::cuda {

inline PSF_BOTH int power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Slots per thread for sorting: a power of two.
template <int K> PSF_BOTH constexpr int sort_slots() { return K <= 2 ? K : K <= 4 ? 4 : 8; }

// sqrt(sum of squares) of the valid scores x, at least 1e-6; 1 if scores are not normalised.
template <int K, class T, class Team> PSF_STEP T norm_of(Team& team, const Slots<T, K>& x, int k, bool normalize) {
  if (!normalize) return T(1);
  T top = 0, sum = 0;
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const T size = magnitude(x[i]);
    top = size > top ? size : top;
  }
  top = team.largest(top);
  const T scale = top > T(1e-6) ? top : T(1);  // squares of scaled scores do not overflow
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const T s = x[i] / scale;
    sum += s * s;
  }
  const T norm = square_root(team.sum(sum)) * scale;
  return norm < T(1e-6) ? T(1e-6) : norm;
}

// t, order and rank of a row, whose scores descend already if they are presorted. A NaN sorts first, so that order stays a permutation.
template <int K, class T, class Team>
PSF_STEP void sort_row(Team& team, Arena arena, const SoftPermutation<T>& p, int64_t row, int n, int k) {
  const int64_t at = row * p.N, first = static_cast<int64_t>(team.index()) * k;
  Slots<T, K> key = arena.slots<T, K>(k);
  Slots<int, K> node = arena.slots<int, K>(k);
  load_slots<K>(key, p.scores + at, first, n, k, T(0));
  const T norm = norm_of<K>(team, key, k, p.normalize);
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const T s = key[i] / norm;
    key[i] = first + i >= n ? -T(INFINITY) : s == s ? s : T(INFINITY);
    node[i] = static_cast<int>(first + i);
  }
  if (!p.presorted) sort<K>(team, key, node, k);
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const int64_t j = first + i;
    if (j >= p.N) continue;
    const int64_t u = node[i];
    p.t[at + j] = j < n ? key[i] : T(0);
    p.order[at + j] = u;
    p.rank[at + u] = j;
  }
}

template <int K, class T>
PSF_STEP void store_log(const Slots<T, K>& x, T* row, int64_t first, int n, int64_t N, int k) {
  PSF_UNROLLED
  for (int i = 0; i < k; ++i)
    if (first + i < N) row[first + i] = first + i < n ? logarithm(x[i]) : T(0);
}

template <class T> int64_t memory_bytes(const SoftPermutation<T>&, int64_t slots, int threads) {
  const int64_t sorting = power_of_two(static_cast<int>(slots)) * (sizeof(T) + sizeof(int));
  const int64_t scaling = (3 * slots + 1) * sizeof(T);
  return (sorting > scaling ? sorting : scaling) * threads;
}
template <class T> int64_t memory_bytes(const SoftPermutationBackward<T>&, int64_t slots, int threads) {
  return (8 * slots + 1) * static_cast<int64_t>(sizeof(T)) * threads;
}
// c after all iterations but the last.
template <class T> int64_t saved_numbers(const SoftPermutationBackward<T>& p, int64_t slots) {
  return p.iterations > 1 ? (p.iterations - 1) * slots : 0;
}

// slots: slots per thread if K is 0.
template <int K, class T, class Team>
PSF_STEP void compute_row(Team& team, Arena arena, T*, const SoftPermutation<T>& p, int64_t row, int slots) {
  const int n = valid_nodes(p, row), k = K > 0 ? K : slots;
  sort_row<sort_slots<K>(), T>(team, arena, p, row, n, K > 0 ? sort_slots<K>() : power_of_two(k));
  team.sync();
  const int64_t at = row * p.N, first = static_cast<int64_t>(team.index()) * k;
  Laplace<Team, T, K, false> kernel(team, arena, p.t + at, n, k, T(1) / p.tau);
  Slots<T, K> c = arena.slots<T, K>(k), r = arena.slots<T, K>(k);
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) c[i] = r[i] = T(1);
  PSF_ROLLED
  for (int step = 0; step < p.iterations; ++step) {
    product<1>(kernel, &c, &r, [&](int i, const T* K_x, const T* sgn_x) { r[i] = reciprocal(K_x[0]); });
    product<1>(kernel, &r, &c, [&](int i, const T* K_x, const T* sgn_x) { c[i] = reciprocal(K_x[0]); });
  }
  store_log<K, T>(r, p.log_r + at, first, n, p.N, k);
  store_log<K, T>(c, p.log_c + at, first, n, p.N, k);
}

// An incoming gradient; 0 if there is none, and in the padding.
template <class T> PSF_STEP T outside(const T* d, int64_t at, int n, int64_t j) { return d && j < n ? d[at + j] : T(0); }

// saved: room for c after all iterations but the last, each thread's slots for itself.
template <int K, class T, class Team>
PSF_STEP void compute_row(Team& team, Arena arena, T* saved, const SoftPermutationBackward<T>& p, int64_t row, int slots) {
  const int n = valid_nodes(p, row), k = K > 0 ? K : slots, size = team.size();
  const int64_t at = row * p.N, first = static_cast<int64_t>(team.index()) * k;
  const T by_tau = T(1) / p.tau;
  Slots<T, K> dt = arena.slots<T, K>(k);
  {
    Arena rest = arena;
    Laplace<Team, T, K, false> kernel(team, rest, p.t + at, n, k, by_tau);
    Slots<T, K> x[2] = {rest.slots<T, K>(k), rest.slots<T, K>(k)}, room[2] = {rest.slots<T, K>(k), rest.slots<T, K>(k)};
    Slots<T, K> c = rest.slots<T, K>(k), sgn_c = rest.slots<T, K>(k);
    const auto kept = [&](int step, int i) -> T& {
      return saved[(static_cast<int64_t>(step - 1) * k + i) * size + team.index()];
    };
    // c_0 = 1, r_m = 1 / (K c_{m-1}), c_m = 1 / (K r_m). Ends with r_m in x[0], c_{m-1} in c, its signed product in sgn_c and
    // the adjoint's w = c_m dL/dlog c_m in x[1], for the last m.
    PSF_UNROLLED
    for (int i = 0; i < k; ++i) {
      x[1][i] = T(1);
      dt[i] = T(0);
    }
    PSF_ROLLED
    for (int step = 1; step <= p.iterations; ++step) {
      product<1>(kernel, &x[1], &x[0], [&](int i, const T* K_x, const T* sgn_x) {
        c[i] = x[1][i];
        sgn_c[i] = sgn_x[0];
        x[0][i] = reciprocal(K_x[0]);
      });
      product<1>(kernel, &x[0], &x[1], [&](int i, const T* K_x, const T* sgn_x) {
        x[1][i] = reciprocal(K_x[0]);
        if (step < p.iterations) kept(step, i) = x[1][i];
      });
    }
    PSF_UNROLLED
    for (int i = 0; i < k; ++i) x[1][i] = outside(p.d_log_c, at, n, first + i) * x[1][i];
    PSF_ROLLED
    for (int step = p.iterations; step > 0; --step) {
      // x: r_m and w of c_m; then w of r_m and, for the iteration before, c_{m-2}
      product<2>(kernel, x, room, [&](int i, const T* K_x, const T* sgn_x) {
        const T r = x[0][i], w = x[1][i];
        dt[i] += inverse_by_t(r, sgn_x[0], w, sgn_x[1]);
        T rho = inverse_by_log(r, K_x[1]);
        if (step == p.iterations) rho += outside(p.d_log_r, at, n, first + i);
        x[0][i] = rho * r;
        x[1][i] = step > 2 ? kept(step - 2, i) : T(1);
      });
      product<2>(kernel, x, room, [&](int i, const T* K_x, const T* sgn_x) {
        const T w = x[0][i], before = x[1][i], ci = c[i];
        dt[i] += inverse_by_t(ci, sgn_c[i], w, sgn_x[0]);
        sgn_c[i] = sgn_x[1];
        c[i] = before;
        x[0][i] = reciprocal(K_x[1]);
        x[1][i] = inverse_by_log(ci, K_x[0]) * ci;
      });
    }
  }

  // t = s / norm: d_s = (d_t - t <t, d_t>) / norm, without the second term if the norm is clamped.
  Slots<T, K> x = arena.slots<T, K>(k);
  load_slots<K>(x, p.scores + at, first, n, k, T(0));
  const T norm = norm_of<K>(team, x, k, p.normalize);
  load_slots<K>(x, p.t + at, first, n, k, T(0));
  T inner = 0;
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    dt[i] = outside(p.d_t, at, n, first + i) + dt[i] * by_tau;
    inner += dt[i] * x[i];
  }
  inner = team.sum(inner);
  if (!p.normalize || !(norm > T(1e-6))) inner = T(0);
  PSF_UNROLLED
  for (int i = 0; i < k; ++i) {
    const int64_t j = first + i, node = j < n ? p.order[at + j] : j;
    if (j < p.N && node >= 0 && node < p.N) p.d_scores[at + node] = j < n ? (dt[i] - x[i] * inner) / norm : T(0);
  }
}

}  // namespace psf::cuda
