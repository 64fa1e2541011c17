// Rows of C channels: their moments and normalisation, a vector of channels at a time.
#include "vectors.h"

#include "products.h"

// Mean and sum of the squared distances from it.
template <class T> void moments(const T* __restrict__ z, int64_t rows, int64_t C, T* __restrict__ mean, T* __restrict__ squares) {
  for (int64_t c = 0; c < C; c += lanes<T>) {
    const int64_t count = std::min<int64_t>(lanes<T>, C - c);
    Vec<T> sum{}, square{};
    for (int64_t r = 0; r < rows; ++r) sum += load_some(z + r * C + c, count);
    const Vec<T> center = sum * (T(1) / T(rows));
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> distance = load_some(z + r * C + c, count) - center;
      square += distance * distance;
    }
    store_some(mean + c, center, count);
    store_some(squares + c, square, count);
  }
}
// max(0, scale z + shift) in place of z
template <class T> void scale_relu(T* __restrict__ z, const T* __restrict__ scale, const T* __restrict__ shift, int64_t rows, int64_t C) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < C; ++c) {
      const T u = z[r * C + c] * scale[c] + shift[c];
      z[r * C + c] = u > T(0) ? u : u == u ? T(0) : u;
    }
}
// The gradient where the ReLU is on. (With vector operations: compilers turn a condition into a masked load, much slower.)
template <class T> inline Vec<T> passed(Vec<T> z, Vec<T> d_y, Vec<T> scale, Vec<T> shift) {
  return z * scale + shift > T(0) ? d_y : Vec<T>{};
}
// Sums of g and g (z - mean), g the gradient before the ReLU.
template <class T>
void add_gradients(const T* __restrict__ d_y, const T* __restrict__ z, const T* __restrict__ scale, const T* __restrict__ shift, const T* __restrict__ mean, int64_t rows, int64_t C, T* __restrict__ sum, T* __restrict__ product) {
  for (int64_t c = 0; c < C; c += lanes<T>) {
    const int64_t count = std::min<int64_t>(lanes<T>, C - c);
    const Vec<T> a = load_some(scale + c, count), b = load_some(shift + c, count), m = load_some(mean + c, count);
    Vec<T> s{}, p{};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> v = load_some(z + r * C + c, count), g = passed<T>(v, load_some(d_y + r * C + c, count), a, b);
      s += g;
      p += g * (v - m);
    }
    for (int64_t l = 0; l < count; ++l) sum[c + l] += s[l], product[c + l] += p[l];
  }
}
// d_z = scale g - offset - slope (z - mean); may share z's memory
template <class T>
void input_gradients(const T* __restrict__ d_y, const T* z, const T* __restrict__ scale, const T* __restrict__ shift, const T* __restrict__ mean, const T* __restrict__ offset, const T* __restrict__ slope, int64_t rows,
                     int64_t C, T* d_z) {
  for (int64_t r = 0; r < rows; ++r, d_y += C, z += C, d_z += C)
    for (int64_t c = 0; c < C; c += lanes<T>) {
      const int64_t count = std::min<int64_t>(lanes<T>, C - c);
      const Vec<T> a = load_some(scale + c, count), v = load_some(z + c, count);
      const Vec<T> g = passed<T>(v, load_some(d_y + c, count), a, load_some(shift + c, count));
      const Vec<T> d = a * g - load_some(offset + c, count) - load_some(slope + c, count) * (v - load_some(mean + c, count));
      store_some(d_z + c, d, count);
    }
}
