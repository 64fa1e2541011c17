// The gradient of rows that permutations move, to the soft permutations. dL/dP[i, j] = <a_i, b_j> in sorted rows has rank D, so
// with P[i, j] = r_i K_ij c_j, w_i = r_i a_i and v_j = c_j b_j four scans of D numbers give
//   d log_r_i = <w_i, (K v)_i>,  d log_c_j = <v_j, (K w)_j>,
//   d t_i = (<w_i, (lower - upper) v> + <v_i, (lower - upper) w>) / tau,
// where lower and upper are K below and above its diagonal of ones.
#include "laplace.h"
#include "vectors.h"

// --- few numbers a row: the samples of a tile side by side ---

inline int64_t permute_tile_scratch(int64_t slots) { return (laplace_arrays + 11) * (slots + 1); }

// Adds x_i (K y)_i to `product`, and x_i ((lower - upper) y)_i to `difference`.
template <class T> struct AddProducts {
  const T* x;
  T *product, *difference;
  __attribute__((always_inline)) Vec<T> operator()(int64_t i, Vec<T>, Vec<T> K_y, Vec<T> sgn_y) const {
    const Vec<T> xi = load(x + i);
    store(product + i, load(product + i) + xi * K_y);
    store(difference + i, load(difference + i) - xi * sgn_y);
    return Vec<T>{};
  }
};

// Of the rows of a tile; a and b of each. p: of the first row.
template <class T>
void permute_gradient_lanes(const Tile<T>& tile, const MovedRows<T>* a, const MovedRows<T>* b, int64_t D, const Soft<T>& p, T* memory) {
  constexpr int L = lanes<T>;
  const int64_t n = tile.slots, step = (n + 1) * L;
  T* at = memory;
  const auto next = [&] { return std::exchange(at, at + step); };
  T *t = next(), *r = next(), *c = next(), *w = next(), *v = next(), *scan = next(), *unused = next(), *listed = next();
  T* out[3] = {next(), next(), next()};
  load_tile(tile, p.t, t);
  const Laplace<T> K(tile, t, T(1) / p.by_tau, at);
  load_tile(tile, p.log_r, r);
  load_tile(tile, p.log_c, c);
  for (T* one : {r, c})
    for (int64_t i = 0; i < n * L; i += L) store(one + i, exponential<T>(load(one + i)));
  for (T* one : out) std::fill_n(one, n * L, T(0));
  const auto load_column = [&](const MovedRows<T>* rows, int64_t q, const T* scale, T* to) {  // 0 where no node is valid
    const T* from = rows[0].x;
    bool apart = D > 1;
    for (int row = 0; row < tile.rows; ++row) apart |= rows[row].at || rows[row].x != from + row * tile.N;
    for (int row = 0; apart && row < tile.rows; ++row)
      for (int64_t i = 0; i < tile.nodes[row]; ++i) listed[row * tile.N + i] = rows[row].row(i, D)[q];
    load_tile(tile, apart ? listed : from, to);
    for (int64_t i = 0; i < n * L; i += L) store(to + i, load(to + i) * load(scale + i));
  };
  for (int64_t q = 0; q < D; ++q) {
    load_column(a, q, r, w);
    load_column(b, q, c, v);
    Scanned<T> of_v{v, scan, {}, {}};
    begin(K, of_v);
    pass<true>(K, of_v, unused, AddProducts<T>{w, out[1], out[0]});
    Scanned<T> of_w{w, scan, {}, {}};
    begin(K, of_w);
    pass<true>(K, of_w, unused, AddProducts<T>{v, out[2], out[0]});
  }
  for (int64_t i = 0; i < n * L; i += L) store(out[0] + i, load(out[0] + i) * p.by_tau);
  for (int k = 0; k < 3; ++k) store_tile(tile, p.out[k], out[k]);
}

// --- more: the numbers of a row side by side ---

template <class T> inline T total(Vec<T> x) {
  T sum = 0;
  for (int l = 0; l < lanes<T>; ++l) sum += x[l];
  return sum;
}

// The scans, with rows of `width` vectors. decay: K[i - 1, i] for every i > 0, at decay[i].
template <class T> void scans(int64_t n, int64_t width, const T* decay, const Vec<T>* w, const Vec<T>* v, Vec<T>* f, const Soft<T>& p) {
  using V = Vec<T>;
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

// p.out: zeros. memory: 3 (n + 16) + 2 (n + 1) (D + 16) values.
template <class T>
void permute_gradient(const MovedRows<T>& a, const MovedRows<T>& b, int64_t n, int64_t D, const Soft<T>& p, T* memory) {
  constexpr int64_t L = lanes<T>;
  const int64_t padded = (n + L - 1) / L * L, width = (D + L - 1) / L * L;
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
  scans<T>(n, width / L, decay, vectors(w), vectors(v), vectors(f), p);
}

template <class T> void add_row(T* sum, const T* x, int64_t n) { axpy(sum, T(1), x, n); }
