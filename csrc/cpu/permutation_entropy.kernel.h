// Entropies of the rows and columns of P[i, j] = r_i K_ij c_j, up to lanes<T> samples side by side. A normalised row does
// not depend on r: p_ij = K_ij c_j / m_i with m = K c; columns are the same with r in the place of c. With l = log v,
// D the scaled distances and q = K(v l) - (D o K) v:   H_i = log m_i - q_i / m_i.
#include "laplace.h"

// log v into l and v, padding with l = 0, v = 1.
template <class T>
inline void load_weights(const T* log_v, int64_t N, const int64_t* count, int rows, int64_t n, T* l, T* v) {
  load_rows(log_v, N, count, rows, n, l);
  for (int64_t j = 0; j < n; ++j) store(v + j * lanes<T>, exp_any<T>(load(l + j * lanes<T>)));
}

// Backward scans of v, v l and the distance-weighted v into b; b holds 3 (n + 1) slots.
template <class T> inline void backward_scans(const T* a, const T* d, const T* l, const T* v, int64_t n, T* b) {
  constexpr int L = lanes<T>;
  const int64_t step = (n + 1) * L;
  Vec<T> x{}, y{}, z{};
  for (int64_t i = n - 1; i >= 0; --i) {
    const Vec<T> an = load(a + (i + 1) * L), vi = load(v + i * L);
    z = an * (z + load(d + (i + 1) * L) * x);
    x = vi + an * x;
    y = vi * load(l + i * L) + an * y;
    store(b + i * L, x);
    store(b + step + i * L, y);
    store(b + 2 * step + i * L, z);
  }
}

template <class T> int64_t permutation_entropy_scratch(int64_t n) { return 14 * (n + 1) * lanes<T>; }

// out[lane]: sum of the entropies of all valid rows and columns.
template <class T>
void permutation_entropy_lanes(const T* t_in, const T* log_r, const T* log_c, int64_t N, const int64_t* count, int rows, T tau,
                               T* scratch, T* out) {
  constexpr int L = lanes<T>;
  const int64_t n = largest<T>(count), step = (n + 1) * L;
  T *t = scratch, *a = t + step, *d = a + step, *l = d + step, *v = l + step, *b = v + step;
  load_rows(t_in, N, count, rows, n, t);
  decays<T>(t, count, n, tau, a, d);
  Vec<T> sum{};
  for (const T* log_v : {log_c, log_r}) {
    load_weights(log_v, N, count, rows, n, l, v);
    backward_scans(a, d, l, v, n, b);
    Vec<T> x{}, y{}, z{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec<T> ai = load(a + i * L), vi = load(v + i * L), vl = vi * load(l + i * L);
      z = ai * (z + load(d + i * L) * x);
      x = vi + ai * x;
      y = vl + ai * y;
      const Vec<T> m = x + load(b + i * L) - vi;
      const Vec<T> q = y + load(b + step + i * L) - vl - z - load(b + 2 * step + i * L);
      sum += log_positive<T>(m) - q / m;
    }
  }
  for (int lane = 0; lane < rows; ++lane) out[lane] = sum[lane];
}

// weight[lane]: gradient of the loss with respect to out[lane]. With alpha = 1 / m, beta = -q / m^2:
//   d l = -v (l K alpha - (D o K) alpha + K beta)
//   d t = (alpha (sgnK (v l) - sgnDK v) + beta sgnK v + v (l sgnK alpha - sgnDK alpha + sgnK beta)) / tau
template <class T>
void permutation_entropy_backward_lanes(const T* weight, const T* t_in, const T* log_r, const T* log_c, int64_t N,
                                        const int64_t* count, int rows, T tau, T* scratch, T* d_t, T* d_log_r, T* d_log_c) {
  constexpr int L = lanes<T>;
  const int64_t n = largest<T>(count), step = (n + 1) * L;
  T *t = scratch, *a = t + step, *d = a + step, *l = d + step, *v = l + step, *b = v + step, *alpha = b + 3 * step,
    *beta = alpha + step, *f = beta + step, *dt = f + 3 * step;
  load_rows(t_in, N, count, rows, n, t);
  decays<T>(t, count, n, tau, a, d);
  for (int64_t i = 0; i < n; ++i) store(dt + i * L, Vec<T>{});
  Vec<T> w{};
  for (int lane = 0; lane < rows; ++lane) w[lane] = weight[lane];
  const Vec<T> w_tau = w / tau;

  const T* const log_vs[] = {log_c, log_r};
  T* const d_logs[] = {d_log_c, d_log_r};
  for (int side = 0; side < 2; ++side) {
    load_weights(log_vs[side], N, count, rows, n, l, v);
    backward_scans(a, d, l, v, n, b);
    Vec<T> x{}, y{}, z{}, fa{}, fb{}, fz{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec<T> ai = load(a + i * L), di = load(d + i * L), vi = load(v + i * L), vl = vi * load(l + i * L);
      z = ai * (z + di * x);
      x = vi + ai * x;
      y = vl + ai * y;
      const Vec<T> bx = load(b + i * L), by = load(b + step + i * L), bz = load(b + 2 * step + i * L);
      const Vec<T> m = x + bx - vi, q = y + by - vl - z - bz;
      const Vec<T> al = T(1) / m, be = -q * al * al;
      store(dt + i * L, load(dt + i * L) + al * ((by - y) - (bz - z)) + be * (bx - x));
      fz = ai * (fz + di * fa);
      fa = al + ai * fa;
      fb = be + ai * fb;
      store(alpha + i * L, al);
      store(beta + i * L, be);
      store(f + i * L, fa);
      store(f + step + i * L, fb);
      store(f + 2 * step + i * L, fz);
    }
    Vec<T> ba{}, bb{}, bz{};
    for (int64_t i = n - 1; i >= 0; --i) {
      const Vec<T> an = load(a + (i + 1) * L), vi = load(v + i * L), li = load(l + i * L);
      const Vec<T> al = load(alpha + i * L), be = load(beta + i * L);
      bz = an * (bz + load(d + (i + 1) * L) * ba);
      ba = al + an * ba;
      bb = be + an * bb;
      const Vec<T> ga = load(f + i * L), gb = load(f + step + i * L), gz = load(f + 2 * step + i * L);
      store(l + i * L, -w * vi * (li * (ga + ba - al) - (gz + bz) + (gb + bb - be)));
      store(dt + i * L, load(dt + i * L) + vi * (li * (ba - ga) - (bz - gz) + (bb - gb)));
    }
    store_rows(d_logs[side], N, count, rows, l);
  }
  for (int64_t i = 0; i < n; ++i) store(dt + i * L, load(dt + i * L) * w_tau);
  store_rows(d_t, N, count, rows, dt);
}
