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
// Sums of g and g (x - mean), g the gradient where the ReLU is on.
template <class T>
void add_gradients(const T* __restrict__ d_y, const T* __restrict__ x, const T* __restrict__ scale, const T* __restrict__ shift, const T* __restrict__ mean, int64_t rows, int64_t C, T* __restrict__ sum, T* __restrict__ product) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < C; ++c) {
      const T v = x[r * C + c], g = v * scale[c] + shift[c] > T(0) ? d_y[r * C + c] : T(0);
      sum[c] += g;
      product[c] += g * (v - mean[c]);
    }
}
// d_x = scale g - offset - slope (x - mean)
template <class T>
void input_gradients(const T* __restrict__ d_y, const T* __restrict__ x, const T* __restrict__ scale, const T* __restrict__ shift, const T* __restrict__ mean, const T* __restrict__ offset, const T* __restrict__ slope, int64_t rows,
                     int64_t C, T* __restrict__ d_x) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < C; ++c) {
      const T v = x[r * C + c], g = v * scale[c] + shift[c] > T(0) ? d_y[r * C + c] : T(0);
      d_x[r * C + c] = scale[c] * g - offset[c] - slope[c] * (v - mean[c]);
    }
}
