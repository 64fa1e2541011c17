// The gradient of rows that a sample's permutation moves, to the soft permutation. dL/dP[i, j] = <a_i, b_j> in sorted rows
// has rank D, so with P[i, j] = r_i K_ij c_j, w_i = r_i a_i and v_j = c_j b_j four scans of D numbers give
//   d log_r_i = <w_i, (K v)_i>,  d log_c_j = <v_j, (K w)_j>,
//   d t_i = (<w_i, (lower - upper) v> + <v_i, (lower - upper) w>) / tau,
// where lower and upper are K below and above its diagonal of ones.
#include "vectors.h"

// Row i of a matrix is x + D at[i], or x + D i without `at`.
template <class T> struct MovedRows {
  const T* x;
  const int64_t* at;
  const T* row(int64_t i, int64_t D) const { return x + D * (at ? at[i] : i); }
};

template <class T> inline T total(T x) { return x; }
template <class T> inline T total(Vec<T> x) {
  T sum = 0;
  for (int l = 0; l < lanes<T>; ++l) sum += x[l];
  return sum;
}

// The scans, with rows of `width` numbers of type V (T, or vectors of T). decay: K[i - 1, i] for every i > 0, at decay[i].
template <class T, class V> void scans(int64_t n, int64_t width, const T* decay, const V* w, const V* v, V* f, const Soft<T>& p) {
  V* const g = f + width;  // f, g: (lower or upper) v, w
  for (const bool up : {true, false}) {
    std::fill_n(f, 2 * width, V{});
    for (int64_t k = up ? 0 : 1; k < n; ++k) {
      const int64_t i = up ? k : n - 1 - k;
      const V *wi = w + i * width, *vi = v + i * width;
      V of_row{}, of_column{}, diagonal{};
      if (k > 0) {
        const int64_t before = up ? i - 1 : i + 1;
        const T a = decay[up ? i : i + 1];
        const V *w_before = w + before * width, *v_before = v + before * width;
        for (int64_t q = 0; q < width; ++q) {
          f[q] = a * (f[q] + v_before[q]);
          g[q] = a * (g[q] + w_before[q]);
          of_row += wi[q] * f[q];
          of_column += vi[q] * g[q];
        }
      }
      if (up)
        for (int64_t q = 0; q < width; ++q) diagonal += wi[q] * vi[q];
      const T row = total<T>(of_row), column = total<T>(of_column), both = total<T>(diagonal);
      p.out[0][i] += (up ? p.by_tau : -p.by_tau) * (row + column);
      p.out[1][i] += row + both;
      p.out[2][i] += column + both;
    }
  }
}

inline int64_t width_in_lanes(int64_t D, int64_t L) { return D < 4 ? D : (D + L - 1) / L * L; }

// p.out: zeros. memory: 3 (n + 16) + 2 (n + 1) (D + 16) values.
template <class T>
void permute_gradient(const MovedRows<T>& a, const MovedRows<T>& b, int64_t n, int64_t D, const Soft<T>& p, T* memory) {
  constexpr int64_t L = lanes<T>;
  const int64_t padded = (n + L - 1) / L * L, width = width_in_lanes(D, L);
  T *decay = memory, *r = decay + padded, *c = r + padded, *w = c + padded, *v = w + n * width, *f = v + n * width;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = std::min(L, n - i);
    const Vec<T> here = load_some(p.t + i, count);
    Vec<T> before = here;
    for (int64_t l = 0; l < count; ++l) before[l] = p.t[std::max<int64_t>(i + l - 1, 0)];
    store(decay + i, exponential<T>((here - before) * p.by_tau));
    store(r + i, exponential<T>(load_some(p.log_r + i, count)));
    store(c + i, exponential<T>(load_some(p.log_c + i, count)));
  }
  for (int64_t i = 0; i < n; ++i) {
    const T *ai = a.row(i, D), *bi = b.row(i, D);
    T *wi = w + i * width, *vi = v + i * width;
    for (int64_t q = 0; q < D; ++q) wi[q] = r[i] * ai[q], vi[q] = c[i] * bi[q];
    std::fill(wi + D, wi + width, T(0));
    std::fill(vi + D, vi + width, T(0));
  }
  const auto vectors = [](T* x) { return reinterpret_cast<Vec<T>*>(x); };
  if (width < 4) scans<T, T>(n, width, decay, w, v, f, p);
  else scans<T, Vec<T>>(n, width / L, decay, vectors(w), vectors(v), vectors(f), p);
}

template <class T> void add_row(T* sum, const T* x, int64_t n) { axpy(sum, T(1), x, n); }
