// Gram-Schmidt on up to lanes<T> d x d matrices side by side; entry (i, k) of a matrix is slot i d + k.

template <class T> inline Vec<T> column_dot(const T* x, const T* y, int d) {  // columns: stride d slots
  Vec<T> sum{};
  for (int i = 0; i < d; ++i) sum += load(x + i * d * lanes<T>) * load(y + i * d * lanes<T>);
  return sum;
}

template <class T> inline Vec<T> root(Vec<T> x) {
  for (int l = 0; l < lanes<T>; ++l) x[l] = std::sqrt(x[l]);
  return x;
}

template <class T> inline bool any(IntVec<T> mask) {
  bool found = false;
  for (int l = 0; l < lanes<T>; ++l) found |= mask[l] != 0;
  return found;
}

// Columns shorter than this share of their length count as dependent on those before.
template <class T> constexpr T dependent = sizeof(T) == 4 ? T(1e-6) : T(1e-14);

// Takes columns 0..k-1 of q out of column k, twice: once leaves what rounding let through.
template <class T> inline void orthogonalise(T* q, int k, int d) {
  constexpr int L = lanes<T>;
  for (int pass = 0; pass < 2; ++pass)
    for (int j = 0; j < k; ++j) {
      const Vec<T> dot = column_dot<T>(q + j * L, q + k * L, d);
      for (int i = 0; i < d; ++i) {
        T* x = q + (i * d + k) * L;
        store(x, load(x) - dot * load(q + (i * d + j) * L));
      }
    }
}

// The axis farthest from the span of columns 0..k-1, orthogonalised and normalised, where `fill` says so.
template <class T> inline void fill_column(T* q, int k, int d, IntVec<T> fill) {
  constexpr int L = lanes<T>;
  Vec<T> best = splat<T>(-1), axis{};
  for (int i = 0; i < d; ++i) {
    Vec<T> left = splat<T>(1);
    for (int j = 0; j < k; ++j) {
      const Vec<T> x = load(q + (i * d + j) * L);
      left -= x * x;
    }
    const IntVec<T> better = left > best;
    best = better ? left : best;
    axis = better ? splat<T>(T(i)) : axis;
  }
  for (int i = 0; i < d; ++i) {
    T* x = q + (i * d + k) * L;
    store(x, fill ? (axis == T(i) ? splat<T>(1) : Vec<T>{}) : load(x));
  }
  orthogonalise(q, k, d);
  const Vec<T> norm = root<T>(column_dot<T>(q + k * L, q + k * L, d));
  for (int i = 0; i < d; ++i) {
    T* x = q + (i * d + k) * L;
    store(x, load(x) / norm);
  }
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
    Vec<T> top{};
    for (int i = 0; i < d; ++i) {
      const Vec<T> x = load(q + (i * d + k) * L), size = x < T(0) ? -x : x;
      top = size > top ? size : top;
    }
    const Vec<T> scale = top > T(0) ? top : splat<T>(1);
    for (int i = 0; i < d; ++i) store(q + (i * d + k) * L, load(q + (i * d + k) * L) / scale);
    const Vec<T> before = root<T>(column_dot<T>(q + k * L, q + k * L, d));
    orthogonalise(q, k, d);
    const Vec<T> after = root<T>(column_dot<T>(q + k * L, q + k * L, d));
    const IntVec<T> fill = after <= dependent<T> * before;
    const Vec<T> norm = fill ? splat<T>(1) : after;
    for (int i = 0; i < d; ++i) store(q + (i * d + k) * L, load(q + (i * d + k) * L) / norm);
    if (any<T>(fill)) fill_column<T>(q, k, d, fill);
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

// u = a_k - sum_{j<k} q_j (q_j . a_k), q_k = u / |u|, |u| = q_k . a_k. A column that was filled passes no gradient.
template <class T>
void orthogonal_frame_backward_lanes(const T* d_q_in, const T* q_in, const T* a_in, int rows, int d, T* scratch, T* d_a) {
  constexpr int L = lanes<T>;
  const int size = d * d * L;
  T *g = scratch, *q = g + size, *a = q + size;
  int64_t count[L];
  for (int l = 0; l < L; ++l) count[l] = d * d;
  load_rows(d_q_in, d * d, count, rows, d * d, g);
  load_rows(q_in, d * d, count, rows, d * d, q);
  load_rows(a_in, d * d, count, rows, d * d, a);
  for (int k = d - 1; k >= 0; --k) {
    const Vec<T> signed_norm = column_dot<T>(q + k * L, a + k * L, d);  // negative where the column was mirrored
    const Vec<T> norm = signed_norm < T(0) ? -signed_norm : signed_norm;
    Vec<T> top{}, length{};
    for (int i = 0; i < d; ++i) {
      const Vec<T> x = load(a + (i * d + k) * L), absolute = x < T(0) ? -x : x;
      top = absolute > top ? absolute : top;
    }
    const Vec<T> scale = top > T(0) ? top : splat<T>(1);  // squares of scaled entries do not overflow
    for (int i = 0; i < d; ++i) {
      const Vec<T> x = load(a + (i * d + k) * L) / scale;
      length += x * x;
    }
    length = root<T>(length) * scale;
    const IntVec<T> filled = norm <= dependent<T> * length;
    const Vec<T> inverse = filled ? Vec<T>{} : T(1) / (filled ? splat<T>(1) : signed_norm);
    const Vec<T> inner = column_dot<T>(q + k * L, g + k * L, d);
    for (int i = 0; i < d; ++i) {
      T* x = g + (i * d + k) * L;
      store(x, (load(x) - load(q + (i * d + k) * L) * inner) * inverse);  // d u
    }
    for (int j = 0; j < k; ++j) {
      const Vec<T> r = column_dot<T>(q + j * L, a + k * L, d), s = column_dot<T>(q + j * L, g + k * L, d);
      for (int i = 0; i < d; ++i) {
        T* x = g + (i * d + j) * L;
        store(x, load(x) - s * load(a + (i * d + k) * L) - r * load(g + (i * d + k) * L));
      }
    }
    for (int j = 0; j < k; ++j) {
      const Vec<T> s = column_dot<T>(q + j * L, g + k * L, d);
      for (int i = 0; i < d; ++i) {
        T* x = g + (i * d + k) * L;
        store(x, load(x) - s * load(q + (i * d + j) * L));
      }
    }
  }
  store_rows(d_a, d * d, count, rows, g);
}
