// Sums over rows of C channels, and what is computed from them. Every loop runs over the channels, one lane each.

template <class T> void add_all(const T* __restrict__ x, int64_t rows, int64_t C, T* __restrict__ sum) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < C; ++c) sum[c] += x[r * C + c];
}
template <class T> void add_squares(const T* __restrict__ x, const T* __restrict__ mean, int64_t rows, int64_t C, T* __restrict__ sum) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < C; ++c) sum[c] += (x[r * C + c] - mean[c]) * (x[r * C + c] - mean[c]);
}
// y = max(0, scale x + shift)
template <class T> void scale_relu(const T* __restrict__ x, const T* __restrict__ scale, const T* __restrict__ shift, int64_t rows, int64_t C, T* __restrict__ y) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < C; ++c) {
      const T z = x[r * C + c] * scale[c] + shift[c];
      y[r * C + c] = z > T(0) ? z : z == z ? T(0) : z;
    }
}
// `count` numbers; the rest of the vector is 0.
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
// The gradient where the ReLU is on. (Written with vectors: of a condition compilers make a masked load, several times slower.)
template <class T> inline Vec<T> passed(Vec<T> x, Vec<T> d_y, Vec<T> scale, Vec<T> shift) {
  return x * scale + shift > T(0) ? d_y : Vec<T>{};
}
// Sums of g and g (x - mean), g the gradient behind the ReLU.
template <class T>
void add_gradients(const T* __restrict__ d_y, const T* __restrict__ x, const T* __restrict__ scale, const T* __restrict__ shift, const T* __restrict__ mean, int64_t rows, int64_t C, T* __restrict__ sum, T* __restrict__ product) {
  for (int64_t c = 0; c < C; c += lanes<T>) {
    const int64_t count = std::min<int64_t>(lanes<T>, C - c);
    const Vec<T> a = load_some(scale + c, count), b = load_some(shift + c, count), m = load_some(mean + c, count);
    Vec<T> s{}, p{};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> v = load_some(x + r * C + c, count), g = passed<T>(v, load_some(d_y + r * C + c, count), a, b);
      s += g;
      p += g * (v - m);
    }
    for (int64_t l = 0; l < count; ++l) sum[c + l] += s[l], product[c + l] += p[l];
  }
}
// d_x = scale g - offset - slope (x - mean)
template <class T>
void input_gradients(const T* __restrict__ d_y, const T* __restrict__ x, const T* __restrict__ scale, const T* __restrict__ shift, const T* __restrict__ mean, const T* __restrict__ offset, const T* __restrict__ slope, int64_t rows,
                     int64_t C, T* __restrict__ d_x) {
  for (int64_t r = 0; r < rows; ++r, d_y += C, x += C, d_x += C)
    for (int64_t c = 0; c < C; c += lanes<T>) {
      const int64_t count = std::min<int64_t>(lanes<T>, C - c);
      const Vec<T> a = load_some(scale + c, count), v = load_some(x + c, count);
      const Vec<T> g = passed<T>(v, load_some(d_y + c, count), a, load_some(shift + c, count));
      const Vec<T> d = a * g - load_some(offset + c, count) - load_some(slope + c, count) * (v - load_some(mean + c, count));
      store_some(d_x + c, d, count);
    }
}
