// Products of small matrices. For each_isa.h, after vectors.h.

// out (I, K): out[i] = sum_r a[i step_i + r step_r] b[r], b (R, K), in tiles of 4 by a few vectors, summed in registers. Rows of
// b and out are `step` values apart.
template <class T>
void products(const T* a, int64_t step_i, int64_t step_r, const T* b, int64_t I, int64_t R, int64_t K, T* out, int64_t step) {
  constexpr int vectors = PSF_VECTOR_BYTES == 64 ? 4 : 2;
  constexpr int64_t wide = vectors * lanes<T>;
  const int64_t tiled_i = I / 4 * 4, tiled_k = K / wide * wide;
  for (int64_t k = 0; k < tiled_k; k += wide)
    for (int64_t i = 0; i < tiled_i; i += 4) {
      Vec<T> sum[4][vectors] = {};
      for (int64_t r = 0; r < R; ++r)
        for (int v = 0; v < vectors; ++v) {
          const Vec<T> some = load(b + r * step + k + v * lanes<T>);
          for (int n = 0; n < 4; ++n) sum[n][v] += a[(i + n) * step_i + r * step_r] * some;
        }
      for (int n = 0; n < 4; ++n)
        for (int v = 0; v < vectors; ++v) store(out + (i + n) * step + k + v * lanes<T>, sum[n][v]);
    }
  for (int64_t i = 0; i < I; ++i)  // the rest after the tiles
    if (const int64_t done = i < tiled_i ? tiled_k : 0; done < K) {
      std::memset(out + i * step + done, 0, (K - done) * sizeof(T));
      for (int64_t r = 0; r < R; ++r) axpy(out + i * step + done, a[i * step_i + r * step_r], b + r * step + done, K - done);
    }
}
// The same of few columns K: out[i] = the products of row i of a with the rows of b_t (K, R), the transposed b.
template <class T> void narrow_products(const T* a, int64_t step_i, const T* b_t, int64_t I, int64_t R, int64_t K, T* out) {
  for (int64_t i = 0; i < I; ++i)
    for (int64_t k = 0; k < K; ++k) out[i * K + k] = dot(a + i * step_i, b_t + k * R, R);
}
template <class T> void products(const T* a, int64_t step_i, int64_t step_r, const T* b, int64_t I, int64_t R, int64_t K, T* out) {
  products<T>(a, step_i, step_r, b, I, R, K, out, K);
}
