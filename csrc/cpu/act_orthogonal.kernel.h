// A d x d matrix on n vectors with C channels each, (n, d, C): out[m, i, c] = sum_j g(i, j) v[m, j, c].

template <class T, int D>
inline void act_fixed(const T* g, const T* v, T* out, int64_t n, int64_t C, bool transposed, bool add, T scale) {
  T m[D][D];
  for (int i = 0; i < D; ++i)
    for (int j = 0; j < D; ++j) m[i][j] = scale * (transposed ? g[j * D + i] : g[i * D + j]);
  for (int64_t k = 0; k < n; ++k) {
    const T* x = v + k * D * C;
    T* y = out + k * D * C;
    for (int64_t c = 0; c < C; ++c)
      for (int i = 0; i < D; ++i) {
        T sum = add ? y[i * C + c] : T(0);
        for (int j = 0; j < D; ++j) sum += m[i][j] * x[j * C + c];
        y[i * C + c] = sum;
      }
  }
}

// out (+)= scale g v, or g^T v where transposed.
template <class T>
void act_vectors(const T* g, const T* v, T* out, int64_t n, int64_t d, int64_t C, bool transposed, bool add, T scale) {
  if (d == 3) return act_fixed<T, 3>(g, v, out, n, C, transposed, add, scale);
  if (d == 2) return act_fixed<T, 2>(g, v, out, n, C, transposed, add, scale);
  for (int64_t k = 0; k < n; ++k)
    for (int64_t i = 0; i < d; ++i)
      for (int64_t c = 0; c < C; ++c) {
        T sum = add ? out[(k * d + i) * C + c] : T(0);
        for (int64_t j = 0; j < d; ++j) sum += scale * (transposed ? g[j * d + i] : g[i * d + j]) * v[(k * d + j) * C + c];
        out[(k * d + i) * C + c] = sum;
      }
}

// d_g(i, j) = scale sum_{m, c} dy[m, i, c] v[m, j, c], with i and j exchanged where transposed.
template <class T>
void frame_gradient(const T* dy, const T* v, T* d_g, int64_t n, int64_t d, int64_t C, bool transposed, T scale) {
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      T sum = T(0);
      for (int64_t k = 0; k < n; ++k)
        for (int64_t c = 0; c < C; ++c) sum += dy[(k * d + i) * C + c] * v[(k * d + j) * C + c];
      d_g[transposed ? j * d + i : i * d + j] = scale * sum;
    }
}
