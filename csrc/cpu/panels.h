// Products with a matrix in panels, summed in registers over its whole length. For each_isa.h, after vectors.h.

constexpr int panel_vectors = PSF_VECTOR_BYTES == 64 ? 4 : 2, panel_rows = PSF_VECTOR_BYTES == 16 ? 4 : 6;
template <class T> constexpr int64_t panel_columns = panel_vectors * lanes<T>;

// b[r step_r + k step_k] of R rows and K columns -> panels (ceil(K / panel_columns), R, panel_columns), padded with 0.
template <class T> void pack_panels(const T* b, int64_t R, int64_t K, int64_t step_r, int64_t step_k, T* panels) {
  for (int64_t k = 0; k < K; k += panel_columns<T>)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t l = 0; l < panel_columns<T>; ++l) *panels++ = k + l < K ? b[r * step_r + (k + l) * step_k] : T(0);
}

template <class T, int I>
inline void panel_block(const T* a, int64_t step_i, int64_t step_r, const T* panel, const T* bias, int64_t R, int64_t columns, bool add, T* out, int64_t step) {
  Vec<T> sum[I][panel_vectors] = {};
  for (int64_t r = 0; r < R; ++r, panel += panel_columns<T>) {
    Vec<T> some[panel_vectors];
    for (int v = 0; v < panel_vectors; ++v) some[v] = load(panel + v * lanes<T>);
    for (int i = 0; i < I; ++i) {
      const Vec<T> by = splat(a[i * step_i + r * step_r]);
      for (int v = 0; v < panel_vectors; ++v) sum[i][v] += by * some[v];
    }
  }
  for (int v = 0; v < panel_vectors && v * lanes<T> < columns; ++v) {
    const int64_t count = columns - v * lanes<T>;
    const Vec<T> first = bias ? load_some(bias + v * lanes<T>, count) : Vec<T>{};
    for (int i = 0; i < I; ++i) {
      T* to = out + i * step + v * lanes<T>;
      store_some(to, (add ? load_some(to, count) : first) + sum[i][v], count);
    }
  }
}

// out (I, K), rows `step` apart: out[i] = (or +=, with `add`) sum_r a[i step_i + r step_r] b[r] + bias, of b (R, K) in panels.
template <class T>
void panel_products(const T* a, int64_t step_i, int64_t step_r, const T* panels, const T* bias, int64_t I, int64_t R, int64_t K, bool add, T* out, int64_t step) {
  for (int64_t k = 0; k < K; k += panel_columns<T>, panels += R * panel_columns<T>) {
    const auto block = [&](auto count, int64_t i) {
      panel_block<T, decltype(count)::value>(a + i * step_i, step_i, step_r, panels, bias ? bias + k : nullptr, R, std::min(panel_columns<T>, K - k), add, out + i * step + k, step);
    };
    int64_t i = 0;
    for (; i + panel_rows <= I; i += panel_rows) block(std::integral_constant<int, panel_rows>(), i);
    switch (I - i) {
      case 5: block(std::integral_constant<int, 5>(), i); break;
      case 4: block(std::integral_constant<int, 4>(), i); break;
      case 3: block(std::integral_constant<int, 3>(), i); break;
      case 2: block(std::integral_constant<int, 2>(), i); break;
      case 1: block(std::integral_constant<int, 1>(), i); break;
    }
  }
}
