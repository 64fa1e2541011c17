// Gram-Schmidt on up to lanes<T> d x d matrices side by side; entry (i, k) of a matrix is slot i d + k.

template <class T> inline Vec<T> column_dot(const T* x, const T* y, int d) {  // columns: stride d slots
  Vec<T> sum{};
  for (int i = 0; i < d; ++i) sum += load(x + i * d * lanes<T>) * load(y + i * d * lanes<T>);
  return sum;
}

template <class T> inline bool any(IntVec<T> mask) {
  bool found = false;
  for (int l = 0; l < lanes<T>; ++l) found |= mask[l] != 0;
  return found;
}

// A column whose orthogonal part is shorter than this share of its length depends on those before it.
template <class T> constexpr T dependent = sizeof(T) == 4 ? T(1e-6) : T(1e-14);
template <class T> constexpr T tie = T(0.999);

// Divides column x by its largest absolute entry (a zero column by 1) and returns it: squares neither over- nor underflow.
template <class T> inline Vec<T> divide_by_largest(T* x, int d) {
  constexpr int L = lanes<T>;
  Vec<T> top{};
  for (int i = 0; i < d; ++i) {
    const Vec<T> entry = load(x + i * d * L), size = entry < T(0) ? -entry : entry;
    top = size > top ? size : top;
  }
  const Vec<T> scale = top > T(0) ? top : splat<T>(1);
  for (int i = 0; i < d; ++i) store(x + i * d * L, load(x + i * d * L) / scale);
  return scale;
}

// Removes columns 0..k-1 of q from column x; twice, since rounding leaves some after one pass.
template <class T> inline void orthogonalise(const T* q, T* x, int k, int d) {
  constexpr int L = lanes<T>;
  for (int pass = 0; pass < 2; ++pass)
    for (int j = 0; j < k; ++j) {
      const Vec<T> dot = column_dot<T>(q + j * L, x, d);
      for (int i = 0; i < d; ++i) store(x + i * d * L, load(x + i * d * L) - dot * load(q + (i * d + j) * L));
    }
}

// x becomes u, its part orthogonal to columns 0..k-1 of q, of the given length; x is replaced if it depends on them.
// Not inlined: the backward pass repeats the forward's decision, so both must round alike.
template <class T>
__attribute__((noinline)) void residual(const T* q, T* x, int k, int d, Vec<T>* length, IntVec<T>* replaced) {
  const Vec<T> before = square_root<T>(column_dot<T>(x, x, d));
  orthogonalise(q, x, k, d);
  *length = square_root<T>(column_dot<T>(x, x, d));
  *replaced = *length <= dependent<T> * before;
}

// The axis farthest from the span of columns 0..k-1, orthogonalised and normalised, where `fill` says so. Of axes as far to
// within `tie` the first, so that rounding does not choose.
template <class T> inline void fill_column(T* q, int k, int d, IntVec<T> fill) {
  constexpr int L = lanes<T>;
  const auto distance = [q, k, d](int i) __attribute__((always_inline)) {
    Vec<T> left = splat<T>(1);
    for (int j = 0; j < k; ++j) {
      const Vec<T> x = load(q + (i * d + j) * L);
      left -= x * x;
    }
    return left;
  };
  Vec<T> farthest{}, axis{};
  for (int i = 0; i < d; ++i) {
    const Vec<T> left = distance(i);
    farthest = left > farthest ? left : farthest;
  }
  for (int i = d - 1; i >= 0; --i) axis = distance(i) >= tie<T> * farthest ? splat<T>(T(i)) : axis;
  T* x = q + k * L;
  for (int i = 0; i < d; ++i)
    store(x + i * d * L, fill ? (axis == T(i) ? splat<T>(1) : Vec<T>{}) : load(x + i * d * L));
  orthogonalise(q, x, k, d);
  const Vec<T> norm = square_root<T>(column_dot<T>(x, x, d));
  for (int i = 0; i < d; ++i) store(x + i * d * L, load(x + i * d * L) / norm);
}

template <class T> inline Vec<T> determinant(const T* q, int d) {
  constexpr int L = lanes<T>;
  const auto at = [q, d](int i, int k) __attribute__((always_inline)) { return load(q + (i * d + k) * L); };
  if (d == 1) return at(0, 0);
  if (d == 2) return at(0, 0) * at(1, 1) - at(0, 1) * at(1, 0);
  return at(0, 0) * (at(1, 1) * at(2, 2) - at(1, 2) * at(2, 1)) - at(0, 1) * (at(1, 0) * at(2, 2) - at(1, 2) * at(2, 0)) +
         at(0, 2) * (at(1, 0) * at(2, 1) - at(1, 1) * at(2, 0));
}

template <class T>
void orthogonal_frame_lanes(const T* matrices, int rows, int d, bool special, T* q, T* out, bool* finite) {
  constexpr int L = lanes<T>;
  int64_t count[L];
  for (int l = 0; l < L; ++l) count[l] = d * d;
  load_rows(matrices, d * d, count, rows, d * d, q);
  Vec<T> bad{};
  for (int i = 0; i < d * d; ++i) bad += load(q + i * L) * T(0);
  if (any<T>(bad != T(0))) {
    *finite = false;
    return;
  }
  for (int k = 0; k < d; ++k) {
    T* x = q + k * L;
    Vec<T> length;
    IntVec<T> replaced;
    divide_by_largest(x, d);
    residual<T>(q, x, k, d, &length, &replaced);
    const Vec<T> norm = replaced ? splat<T>(1) : length;
    for (int i = 0; i < d; ++i) store(x + i * d * L, load(x + i * d * L) / norm);
    if (any<T>(replaced)) fill_column<T>(q, k, d, replaced);
  }
  if (special) {
    const IntVec<T> mirrored = determinant(q, d) < T(0);
    for (int i = 0; i < d; ++i) {
      const Vec<T> x = load(q + i * d * L);
      store(q + i * d * L, mirrored ? -x : x);
    }
  }
  store_rows(out, d * d, count, rows, q);
}

// From the last column to the first, of a_k divided by its largest entry: u_k = a_k - sum_{j<k} q_j r_j with r_j = q_j . a_k,
// q_k = u_k / |u_k|. The gradient is that of the projection onto the complement of q_0, ..., q_{k-1}, a replaced column a
// constant among them: d_a_k = d_u - sum_j q_j s_j with s_j = q_j . d_u, and q_j gets - s_j u_k - r_j d_a_k.
template <class T>
void orthogonal_frame_backward_lanes(const T* d_q_in, const T* q_in, const T* a_in, int rows, int d, T* scratch, T* d_a) {
  constexpr int L = lanes<T>, most = 3;  // the largest d
  const int size = d * d * L;
  T *g = scratch, *q = g + size, *a = q + size;
  int64_t count[L];
  for (int l = 0; l < L; ++l) count[l] = d * d;
  load_rows(d_q_in, d * d, count, rows, d * d, g);
  load_rows(q_in, d * d, count, rows, d * d, q);
  load_rows(a_in, d * d, count, rows, d * d, a);
  for (int k = d - 1; k >= 0; --k) {
    T *u = a + k * L, *d_x = g + k * L;
    const T* q_k = q + k * L;
    Vec<T> r[most], s[most], length;
    IntVec<T> replaced;
    const Vec<T> scale = divide_by_largest(u, d);
    for (int j = 0; j < k; ++j) r[j] = column_dot<T>(q + j * L, u, d);
    residual<T>(q, u, k, d, &length, &replaced);
    const Vec<T> along = column_dot<T>(q_k, u, d), inner = column_dot<T>(q_k, d_x, d);
    const Vec<T> signed_length = along < T(0) ? -length : length;  // negative if the column was mirrored
    const Vec<T> inverse = replaced ? Vec<T>{} : T(1) / (replaced ? splat<T>(1) : signed_length);
    for (int i = 0; i < d; ++i) {
      T* x = d_x + i * d * L;
      store(x, (load(x) - load(q_k + i * d * L) * inner) * inverse);  // d u
    }
    for (int j = 0; j < k; ++j) s[j] = column_dot<T>(q + j * L, d_x, d);
    for (int i = 0; i < d; ++i) {
      Vec<T> x = load(d_x + i * d * L);
      for (int j = 0; j < k; ++j) x -= s[j] * load(q + (i * d + j) * L);  // d a_k
      for (int j = 0; j < k; ++j) {
        T* d_q = g + (i * d + j) * L;
        store(d_q, load(d_q) - s[j] * load(u + i * d * L) - r[j] * x);
      }
      constexpr T largest = std::numeric_limits<T>::max();
      x /= scale;
      x = x > largest ? splat<T>(largest) : x;
      store(d_x + i * d * L, x < -largest ? splat<T>(-largest) : x);
    }
  }
  store_rows(d_a, d * d, count, rows, g);
}
