// Entropies of the rows and columns of P[i, j] = r_i K_ij c_j, a tile of samples. A normalised row does not depend on r:
// p_ij = K_ij c_j / m_i with m = K c; columns are the same with r in place of c. With l = log v, D the scaled distances
// and q = K(v l) - (D o K) v:   H_i = log m_i - q_i / m_i.
#include "laplace.h"

// The scan that enters each lane from its neighbour: the lanes' own scans, passed on over `segments` lanes.
template <bool up, class T> inline Scans<Vec<T>> entering(const Laplace<T>& K, const T* p, const T* q) {
  constexpr int L = lanes<T>;
  Scans<Vec<T>> own, in;
  if (K.segments == 1) return in;
  Vec<T> distance{};
  const T *a = up ? K.a : K.a + L, *d = up ? K.d : K.d + L;
  for (int64_t k = 0; k < K.n; ++k) {
    const int64_t i = (up ? k : K.n - 1 - k) * L;
    own.step(load(a + i), load(d + i), load(p + i), load(q + i));
    distance += load(d + i);
  }
  const Vec<T> across = up ? K.left[0] : K.right[0];
  for (int s = 1; s < K.segments; ++s) {
    Scans<Vec<T>> sum = own;
    sum.add(across, distance, in);
    in = sum.each([](Vec<T> x) { return up ? from_left<1>(x) : from_right<1>(x); });
  }
  return in;
}

// l = log v, v and v l; padding has l = 0, v = 1.
template <class T> struct Weights {
  T *l, *v, *vl;
  void fill(const Tile<T>& tile, const T* log_v) const {
    load_tile(tile, log_v, l);
    for (int64_t j = 0; j < tile.slots * lanes<T>; j += lanes<T>) {
      const Vec<T> lj = load(l + j), vj = exponential<T>(lj);
      store(v + j, vj);
      store(vl + j, vj * lj);
    }
  }
};

// Backward scans of v, v l and the distance-weighted v into b; b holds 3 (n + 1) slots.
template <class T> inline void backward_scans(const Laplace<T>& K, const Weights<T>& x, T* b) {
  constexpr int L = lanes<T>;
  const int64_t step = (K.n + 1) * L;
  Scans<Vec<T>> scan = entering<false>(K, x.v, x.vl);
  for (int64_t i = (K.n - 1) * L; i >= 0; i -= L) {
    scan.step(load(K.a + i + L), load(K.d + i + L), load(x.v + i), load(x.vl + i));
    store(b + i, scan.p);
    store(b + step + i, scan.q);
    store(b + 2 * step + i, scan.far);
  }
}

inline int64_t permutation_entropy_scratch(int64_t slots) {
  return (14 + laplace_arrays) * (slots + 1);
}

// out[row]: sum of the entropies of all valid rows and columns.
template <class T>
void permutation_entropy_lanes(const Tile<T>& tile, const T* t_in, const T* log_r, const T* log_c, T tau, T* scratch, T* out) {
  constexpr int L = lanes<T>;
  const int64_t n = tile.slots, step = (n + 1) * L;
  T *t = scratch, *l = t + step, *v = l + step, *vl = v + step, *b = vl + step;
  load_tile(tile, t_in, t);
  const Laplace<T> K(tile, t, tau, b + 3 * step);
  const Weights<T> x{l, v, vl};
  Vec<T> sum{};
  for (const T* log_v : {log_c, log_r}) {
    x.fill(tile, log_v);
    backward_scans(K, x, b);
    Scans<Vec<T>> f = entering<true>(K, v, vl);
    for (int64_t i = 0; i < n * L; i += L) {
      const Vec<T> vi = load(v + i), vli = load(vl + i);
      f.step(load(K.a + i), load(K.d + i), vi, vli);
      const Vec<T> m = f.p + load(b + i) - vi;
      const Vec<T> q = f.q + load(b + step + i) - vli - f.far - load(b + 2 * step + i);
      sum += row_entropy(log_positive<T>(m), q, reciprocal<T>(m));
    }
  }
  sum = row_sums<T>(tile, sum);
  for (int row = 0; row < tile.rows; ++row) out[row] = sum[row * tile.segments];
}

// weight[row]: gradient of the loss with respect to out[row]. With alpha = 1 / m, beta = -q / m^2:
//   d l = -v (l K alpha - (D o K) alpha + K beta)
//   d t = (alpha (sgnK (v l) - sgnDK v) + beta sgnK v + v (l sgnK alpha - sgnDK alpha + sgnK beta)) / tau
template <class T>
void permutation_entropy_backward_lanes(const Tile<T>& tile, const T* weight, const T* t_in, const T* log_r, const T* log_c,
                                        T tau, T* scratch, T* d_t, T* d_log_r, T* d_log_c) {
  constexpr int L = lanes<T>;
  const int64_t n = tile.slots, step = (n + 1) * L;
  T *t = scratch, *l = t + step, *v = l + step, *vl = v + step, *b = vl + step, *alpha = b + 3 * step, *beta = alpha + step,
    *f = beta + step, *dt = f + 3 * step;
  load_tile(tile, t_in, t);
  const Laplace<T> K(tile, t, tau, dt + step);
  const Weights<T> x{l, v, vl};
  for (int64_t i = 0; i < n * L; i += L) store(dt + i, Vec<T>{});
  Vec<T> w{};
  for (int lane = 0; lane < tile.rows * tile.segments; ++lane) w[lane] = weight[lane / tile.segments];
  const Vec<T> w_tau = w / tau;

  const T* const log_vs[] = {log_c, log_r};
  T* const d_logs[] = {d_log_c, d_log_r};
  for (int side = 0; side < 2; ++side) {
    x.fill(tile, log_vs[side]);
    backward_scans(K, x, b);
    Scans<Vec<T>> up = entering<true>(K, v, vl);
    for (int64_t i = 0; i < n * L; i += L) {
      const Vec<T> vi = load(v + i), vli = load(vl + i);
      up.step(load(K.a + i), load(K.d + i), vi, vli);
      const Vec<T> down_p = load(b + i), down_q = load(b + step + i), down_far = load(b + 2 * step + i);
      const Vec<T> m = up.p + down_p - vi, q = up.q + down_q - vli - up.far - down_far;
      const Vec<T> al = reciprocal<T>(m), be = row_entropy_beta(q, al);
      store(dt + i, load(dt + i) + al * ((down_q - up.q) - (down_far - up.far)) + be * (down_p - up.p));
      store(alpha + i, al);
      store(beta + i, be);
    }
    up = entering<true>(K, alpha, beta);
    for (int64_t i = 0; i < n * L; i += L) {
      up.step(load(K.a + i), load(K.d + i), load(alpha + i), load(beta + i));
      store(f + i, up.p);
      store(f + step + i, up.q);
      store(f + 2 * step + i, up.far);
    }
    Scans<Vec<T>> down = entering<false>(K, alpha, beta);
    for (int64_t i = (n - 1) * L; i >= 0; i -= L) {
      const Vec<T> vi = load(v + i), li = load(l + i), al = load(alpha + i), be = load(beta + i);
      down.step(load(K.a + i + L), load(K.d + i + L), al, be);
      const Vec<T> up_p = load(f + i), up_q = load(f + step + i), up_far = load(f + 2 * step + i);
      store(l + i, -w * vi * (li * (up_p + down.p - al) - (up_far + down.far) + (up_q + down.q - be)));
      store(dt + i, load(dt + i) + vi * (li * (down.p - up_p) - (down.far - up_far) + (down.q - up_q)));
    }
    store_tile(tile, d_logs[side], l);
  }
  for (int64_t i = 0; i < n * L; i += L) store(dt + i, load(dt + i) * w_tau);
  store_tile(tile, d_t, dt);
}
