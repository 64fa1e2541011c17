// Products with the Laplacian kernel K[i, j] = exp(-|t_i - t_j| / tau) of one sorted vector t, in two scans of n:
//   f_i = v_i + a_i f_{i-1},  b_i = v_i + a_{i+1} b_{i+1},  K v = f + b - v,  (sgn o K) v = b - f,
// with a_i = exp(-(t_{i-1} - t_i) / tau), a_0 = a_n = 0. Every array holds n slots of lanes<T> samples side by side.
// A slot with a_i = a_{i+1} = 0 is alone: padding is made of such slots and needs no masks.

// The decays a (n + 1 slots) and, where asked for, the scaled gaps d_i = (t_{i-1} - t_i) / tau, 0 where a_i is.
template <class T> inline void decays(const T* t, const int64_t* count, int64_t n, T tau, T* a, T* d) {
  constexpr int L = lanes<T>;
  Vec<T> valid{};
  for (int l = 0; l < L; ++l) valid[l] = static_cast<T>(count[l]);
  store(a, Vec<T>{});
  store(a + n * L, Vec<T>{});
  if (d) store(d, Vec<T>{});
  if (d) store(d + n * L, Vec<T>{});
  const Vec<T> by_tau = splat<T>(1) / splat<T>(tau);
  for (int64_t i = 1; i < n; ++i) {
    const Vec<T> gap = (load(t + (i - 1) * L) - load(t + i * L)) * by_tau;
    Vec<T> decay = exp_nonpositive<T>(-gap);
    decay = splat<T>(static_cast<T>(i)) < valid ? decay : Vec<T>{};  // gap may be anything in the padding
    store(a + i * L, decay);
    if (d) store(d + i * L, decay > T(0) ? gap : Vec<T>{});
  }
}

// The iterations r = 1 / (K c), c = 1 / (K r) from c = 1. Each pass over n finishes one product and begins the next.
// keep: c (before) and r of every iteration stay in `history`, 2 n slots an iteration.
template <class T, bool keep>
inline void sinkhorn(const T* a, int64_t n, int iterations, T* r, T* c, T* scan, T* history) {
  constexpr int L = lanes<T>;
  const Vec<T> one = splat<T>(1);
  Vec<T> b{};
  for (int64_t i = n - 1; i >= 0; --i) {
    b = one + load(a + (i + 1) * L) * b;
    store(scan + i * L, b);
    store(c + i * L, one);
    store(r + i * L, one);
  }
  for (int k = 0; k < iterations; ++k) {
    T* kept = history + k * 2 * n * L;
    Vec<T> f{}, g{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec<T> ai = load(a + i * L), ci = load(c + i * L);
      f = ci + ai * f;
      const Vec<T> ri = one / (f + load(scan + i * L) - ci);
      g = ri + ai * g;
      store(r + i * L, ri);
      store(scan + i * L, g);
      if (keep) {
        store(kept + i * L, ci);
        store(kept + (n + i) * L, ri);
      }
    }
    Vec<T> h{}, next{};
    for (int64_t i = n - 1; i >= 0; --i) {
      const Vec<T> ai = load(a + (i + 1) * L), ri = load(r + i * L);
      h = ri + ai * h;
      const Vec<T> ci = one / (load(scan + i * L) + h - ri);
      next = ci + ai * next;
      store(c + i * L, ci);
      store(scan + i * L, next);
    }
  }
}
