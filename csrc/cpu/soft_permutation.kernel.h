// The soft permutation of up to lanes<T> samples side by side: sort, Sinkhorn scaling, and the gradient of both.
// Row-major inputs and outputs: `rows` samples of N scores, count[lane] of them valid, n the largest count.
#include "laplace.h"

// Sorts descending by key, ties by the lower index, with Batcher's merge exchange: the same comparisons in every lane.
template <class T> inline void sort_descending(T* key, typename Lanes<T>::Int* index, int64_t n) {
  constexpr int L = lanes<T>;
  int64_t top = 1;
  while (top * 2 < n) top *= 2;
  if (n < 2) return;
  for (int64_t p = top; p > 0; p /= 2) {
    int64_t distance = p, offset = 0;
    for (int64_t q = top;; q /= 2) {
      for (int64_t block = offset; block + distance < n; block += 2 * p) {
        const int64_t end = block + p < n - distance ? block + p : n - distance;
        for (int64_t i = block; i < end; ++i) {
          T *x = key + i * L, *y = x + distance * L;
          auto *xi = index + i * L, *yi = xi + distance * L;
          const auto u = load(x), v = load(y);
          const auto ui = load(xi), vi = load(yi);
          const IntVec<T> swap = (u < v) | ((u == v) & (ui > vi));
          store(x, swap ? v : u);
          store(y, swap ? u : v);
          store(xi, swap ? vi : ui);
          store(yi, swap ? ui : vi);
        }
      }
      if (q == p) break;
      distance = q - p;
      offset = p;
    }
  }
}

// sqrt(sum of squares) of each lane's valid scores, at least 1e-6; ones where scores are not normalised.
template <class T> inline Vec<T> norms(const T* scores, int64_t n, bool normalize) {
  if (!normalize) return splat<T>(1);
  Vec<T> top{}, sum{};
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> s = load(scores + j * lanes<T>), size = s < T(0) ? -s : s;
    top = size > top ? size : top;
  }
  const Vec<T> scale = top > T(1e-6) ? top : splat<T>(1);  // squares of scaled scores do not overflow
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> s = load(scores + j * lanes<T>) / scale;
    sum += s * s;
  }
  Vec<T> norm;
  for (int l = 0; l < lanes<T>; ++l) norm[l] = std::sqrt(sum[l]);
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

template <class T> int64_t soft_permutation_scratch(int64_t n) { return 7 * (n + 1) * lanes<T>; }

template <class T>
void soft_permutation_lanes(const T* scores, int64_t N, const int64_t* count, int rows, T tau, int iterations, bool normalize,
                            T* scratch, int64_t* order, int64_t* rank, T* t_out, T* log_r_out, T* log_c_out, bool* finite) {
  constexpr int L = lanes<T>;
  using Int = typename Lanes<T>::Int;
  const int64_t n = largest<T>(count), step = (n + 1) * L;
  T *t = scratch, *a = t + step, *r = a + step, *c = r + step, *scan = c + step;
  Int* index = reinterpret_cast<Int*>(scan + step);
  load_rows(scores, N, count, rows, n, t);
  *finite = all_finite(t, n);
  if (!*finite) return;

  const Vec<T> norm = norms(t, n, normalize);
  for (int64_t j = 0; j < n; ++j) store(t + j * L, load(t + j * L) / norm);
  for (int l = 0; l < L; ++l) {
    for (int64_t j = 0; j < n; ++j) index[j * L + l] = static_cast<Int>(j);
    for (int64_t j = count[l]; j < n; ++j) t[j * L + l] = -INFINITY;
  }
  sort_descending<T>(t, index, n);
  for (int l = 0; l < rows; ++l) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t node = index[j * L + l];
      order[l * N + j] = node;
      rank[l * N + node] = j;
    }
    for (int64_t j = n; j < N; ++j) order[l * N + j] = rank[l * N + j] = j;
  }

  decays<T>(t, count, n, tau, a, nullptr);
  sinkhorn<T, false>(a, n, iterations, r, c, scan, nullptr);
  for (int64_t j = 0; j < n; ++j) {
    store(r + j * L, log_positive<T>(load(r + j * L)));
    store(c + j * L, log_positive<T>(load(c + j * L)));
  }
  store_rows(t_out, N, count, rows, t);
  store_rows(log_r_out, N, count, rows, r);
  store_rows(log_c_out, N, count, rows, c);
}

template <class T> int64_t soft_permutation_backward_scratch(int64_t n, int iterations) {
  return (9 + 2 * iterations) * (n + 1) * lanes<T>;
}

// Adjoints of log r and log c go back through the iterations; each pass over n finishes one product and begins the next.
template <class T>
void soft_permutation_backward_lanes(const T* d_t_in, const T* d_log_r, const T* d_log_c, const T* scores, const int64_t* order,
                                     const T* t_in, int64_t N, const int64_t* count, int rows, T tau, int iterations,
                                     bool normalize, T* scratch, T* d_scores) {
  constexpr int L = lanes<T>;
  const int64_t n = largest<T>(count), step = (n + 1) * L;
  T *t = scratch, *a = t + step, *r = a + step, *c = r + step, *scan = c + step, *rho = scan + step, *w = rho + step,
    *dt = w + step, *history = dt + step;
  load_rows(t_in, N, count, rows, n, t);
  decays<T>(t, count, n, tau, a, nullptr);
  sinkhorn<T, true>(a, n, iterations, r, c, scan, history);

  load_rows(d_log_r, N, count, rows, n, rho);
  load_rows(d_log_c, N, count, rows, n, w);
  Vec<T> b{};
  for (int64_t i = n - 1; i >= 0; --i) {
    const Vec<T> wi = load(w + i * L) * load(c + i * L);
    b = wi + load(a + (i + 1) * L) * b;
    store(w + i * L, wi);
    store(scan + i * L, b);
    store(dt + i * L, Vec<T>{});
  }
  for (int k = iterations - 1; k >= 0; --k) {
    const T *c0 = history + k * 2 * n * L, *rk = c0 + n * L, *ck = k + 1 < iterations ? rk + n * L : c;
    Vec<T> f{}, g{}, fr{};
    for (int64_t i = 0; i < n; ++i) {  // through log c = -log(K r)
      const Vec<T> ai = load(a + i * L), wi = load(w + i * L), bi = load(scan + i * L), ri = load(rk + i * L);
      f = wi + ai * f;
      fr = ri + ai * fr;
      const Vec<T> sgn_r = T(1) / load(ck + i * L) + ri - T(2) * fr;  // (sgn o K) r = K r + r - 2 f
      const Vec<T> d_log_r = k + 1 < iterations ? Vec<T>{} : load(rho + i * L);
      const Vec<T> next = (d_log_r - ri * (f + bi - wi)) * ri;
      store(dt + i * L, load(dt + i * L) + wi * sgn_r + ri * (bi - f));
      g = next + ai * g;
      store(w + i * L, next);
      store(scan + i * L, g);
    }
    Vec<T> h{}, e{}, hc{};
    for (int64_t i = n - 1; i >= 0; --i) {  // through log r = -log(K c)
      const Vec<T> ai = load(a + (i + 1) * L), wi = load(w + i * L), gi = load(scan + i * L), ci = load(c0 + i * L);
      h = wi + ai * h;
      hc = ci + ai * hc;
      const Vec<T> sgn_c = T(2) * hc - ci - T(1) / load(rk + i * L);
      const Vec<T> next = -ci * (gi + h - wi) * ci;
      store(dt + i * L, load(dt + i * L) + wi * sgn_c + ci * (h - gi));
      e = next + ai * e;
      store(w + i * L, next);
      store(scan + i * L, e);
    }
  }

  // t = s / norm: d_s = (d_t - t <t, d_t>) / norm, without the second term where the norm is clamped.
  load_rows(d_t_in, N, count, rows, n, w);
  load_rows(scores, N, count, rows, n, scan);
  const Vec<T> norm = norms(scan, n, normalize), by_tau = splat<T>(1) / splat<T>(tau);
  Vec<T> inner{};
  for (int64_t i = 0; i < n; ++i) {
    const Vec<T> d = load(w + i * L) + load(dt + i * L) * by_tau;
    inner += d * load(t + i * L);
    store(dt + i * L, d);
  }
  if (!normalize) inner = Vec<T>{};
  inner = norm > T(1e-6) ? inner : Vec<T>{};
  for (int64_t i = 0; i < n; ++i) store(dt + i * L, (load(dt + i * L) - load(t + i * L) * inner) / norm);
  for (int l = 0; l < rows; ++l) {
    for (int64_t j = 0; j < count[l]; ++j) d_scores[l * N + order[l * N + j]] = dt[j * L + l];
    for (int64_t j = count[l]; j < N; ++j) d_scores[l * N + j] = T(0);
  }
}
