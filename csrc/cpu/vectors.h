// Rows of numbers: sums and products of n of them. For each_isa.h, after simd.h.

template <class T> inline void axpy(T* y, T a, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, load(y + i) + a * load(x + i));
  for (; i < n; ++i) y[i] += a * x[i];
}

template <class T> inline T dot(const T* x, const T* y, int64_t n) {
  Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes<T> <= n; i += 4 * lanes<T>)
    for (int k = 0; k < 4; ++k) sum[k] += load(x + i + k * lanes<T>) * load(y + i + k * lanes<T>);
  for (; i + lanes<T> <= n; i += lanes<T>) sum[0] += load(x + i) * load(y + i);
  const Vec<T> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T out = T(0);
  for (int l = 0; l < lanes<T>; ++l) out += total[l];
  for (; i < n; ++i) out += x[i] * y[i];
  return out;
}

// `count` values; the rest of the vector is 0.
template <class T> inline Vec<T> load_some(const T* p, int64_t count) {
  if (count >= lanes<T>) return load(p);
  Vec<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}
template <class T> inline void store_some(T* p, Vec<T> v, int64_t count) {
  if (count >= lanes<T>) return store(p, v);
  std::memcpy(p, &v, count * sizeof(T));
}
