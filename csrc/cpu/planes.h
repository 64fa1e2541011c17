// The steps of small networks on a tile of sequences. A plane holds rows (tokens) of features, and every value is a vector: the
// same feature of `lanes` sequences. So no step but the gradients of weights crosses lanes. Included inside a namespace per
// instruction set; steps and strides count values of T.
#include "vectors.h"

// A linear map takes block_rows rows and block_outs outputs at a time; that many sums stay in registers.
constexpr int block_rows = 5, block_outs = PSF_VECTOR_BYTES == 64 ? 4 : 2;

template <class T> inline T lane_sum(Vec<T> v) {
  if constexpr (lanes<T> >= 16) v += exchange<8>(v);
  if constexpr (lanes<T> >= 8) v += exchange<4>(v);
  if constexpr (lanes<T> >= 4) v += exchange<2>(v);
  return v[0] + v[1];
}

// --- linear maps ---

// w[o step_out + i step_in] of `out` outputs and `in` inputs -> blocks (ceil(out / block_outs), in, block_outs), padded with 0.
template <class T> void pack(const T* w, int64_t out, int64_t in, int64_t step_out, int64_t step_in, T* packed) {
  for (int64_t o = 0; o < out; o += block_outs)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t k = 0; k < block_outs; ++k) *packed++ = o + k < out ? w[(o + k) * step_out + i * step_in] : T(0);
}

template <class T, int R>
void linear_rows(const T* x, int64_t x_step, const T* packed, const T* bias, int64_t in, int64_t out, bool add, T* y, int64_t y_step) {
  for (int64_t o = 0; o < out; o += block_outs) {
    Vec<T> sum[R][block_outs];
    for (int k = 0; k < block_outs; ++k)
      for (int r = 0; r < R; ++r) sum[r][k] = bias && o + k < out ? splat<T>(bias[o + k]) : Vec<T>{};
    for (int64_t i = 0; i < in; ++i, packed += block_outs) {
      Vec<T> some[R];
      for (int r = 0; r < R; ++r) some[r] = load(x + r * x_step + i * lanes<T>);
      for (int k = 0; k < block_outs; ++k)
        for (int r = 0; r < R; ++r) sum[r][k] += packed[k] * some[r];
    }
    for (int k = 0; k < block_outs && o + k < out; ++k)
      for (int r = 0; r < R; ++r) {
        T* to = y + r * y_step + (o + k) * lanes<T>;
        store(to, add ? load(to) + sum[r][k] : sum[r][k]);
      }
  }
}
// y = packed x + bias for every row, or with `add` added to y; bias may be null.
template <class T>
void linear(const T* x, int64_t x_step, int64_t rows, const T* packed, const T* bias, int64_t in, int64_t out, bool add, T* y, int64_t y_step) {
  const auto block = [&](auto count, int64_t r) {
    linear_rows<T, decltype(count)::value>(x + r * x_step, x_step, packed, bias, in, out, add, y + r * y_step, y_step);
  };
  int64_t r = 0;
  for (; r + block_rows <= rows; r += block_rows) block(std::integral_constant<int, block_rows>(), r);
  switch (rows - r) {
    case 4: return block(std::integral_constant<int, 4>(), r);
    case 3: return block(std::integral_constant<int, 3>(), r);
    case 2: return block(std::integral_constant<int, 2>(), r);
    case 1: return block(std::integral_constant<int, 1>(), r);
  }
}

// G outputs by V vectors of inputs, the last of them of `last` inputs, over `rows` rows.
template <class T, int G, int V>
inline void weight_block(const T* dy, int64_t dy_step, const T* panel, int64_t width, int64_t rows, int64_t last, T* d, int64_t d_step) {
  Vec<T> sum[G][V] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int l = 0; l < lanes<T>; ++l) {
      const T *from = panel + (r * lanes<T> + l) * width, *by = dy + r * dy_step + l;
      Vec<T> some[V];
      for (int v = 0; v < V; ++v) some[v] = load(from + v * lanes<T>);
      for (int g = 0; g < G; ++g)
        for (int v = 0; v < V; ++v) sum[g][v] += by[g * lanes<T>] * some[v];
    }
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) {
      T* to = d + g * d_step + v * lanes<T>;
      const int64_t count = v + 1 < V ? lanes<T> : last;
      store_some(to, load_some(to, count) + sum[g][v], count);
    }
}
template <class T, int V>
inline void weight_columns(const T* dy, int64_t dy_step, const T* panel, int64_t width, int64_t rows, int64_t out, int64_t last, T* d, int64_t d_step) {
  int64_t o = 0;
  for (; o + 4 <= out; o += 4) weight_block<T, 4, V>(dy + o * lanes<T>, dy_step, panel, width, rows, last, d + o * d_step, d_step);
  for (; o < out; ++o) weight_block<T, 1, V>(dy + o * lanes<T>, dy_step, panel, width, rows, last, d + o * d_step, d_step);
}
// d (out, in), rows d_step apart: d[o, i] += sum over rows and lanes of dy[o] x[i]; d_bias (out,) may be null. panel: memory for
// block_rows rows of x, a sequence at a time: block_rows * lanes * (in, padded to whole vectors) values.
template <class T>
void weight_gradient(const T* dy, int64_t dy_step, const T* x, int64_t x_step, int64_t rows, int64_t in, int64_t out, T* panel, T* d, int64_t d_step, T* d_bias) {
  constexpr int V = PSF_VECTOR_BYTES == 64 ? 4 : 2;
  const int64_t vectors = (in + lanes<T> - 1) / lanes<T>, width = vectors * lanes<T>;
  for (int64_t o = 0; d_bias && o < out; ++o) {
    Vec<T> sum{};
    for (int64_t r = 0; r < rows; ++r) sum += load(dy + r * dy_step + o * lanes<T>);
    d_bias[o] += lane_sum<T>(sum);
  }
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = std::min<int64_t>(block_rows, rows - first);
    for (int64_t r = 0; r < count; ++r)  // the features of a sequence side by side
      for (int64_t i = 0; i < width; i += lanes<T>) {
        Vec<T> v[lanes<T>];
        for (int64_t k = 0; k < lanes<T>; ++k) v[k] = i + k < in ? load(x + (first + r) * x_step + (i + k) * lanes<T>) : Vec<T>{};
        transpose(v);
        for (int64_t l = 0; l < lanes<T>; ++l) store(panel + (r * lanes<T> + l) * width + i, v[l]);
      }
    const T* by = dy + first * dy_step;
    for (int64_t v = 0; v < vectors; v += V) {
      const int64_t last = std::min<int64_t>(lanes<T>, in - (std::min<int64_t>(v + V, vectors) - 1) * lanes<T>);
      const T* from = panel + v * lanes<T>;
      T* to = d + v * lanes<T>;
      switch (std::min<int64_t>(V, vectors - v)) {
        case 4: weight_columns<T, 4>(by, dy_step, from, width, count, out, last, to, d_step); break;
        case 3: weight_columns<T, 3>(by, dy_step, from, width, count, out, last, to, d_step); break;
        case 2: weight_columns<T, 2>(by, dy_step, from, width, count, out, last, to, d_step); break;
        default: weight_columns<T, 1>(by, dy_step, from, width, count, out, last, to, d_step);
      }
    }
  }
}

// --- products of planes, lane by lane ---

template <class T> struct Strided {
  const T* p;
  int64_t row, k;  // distance of its rows, and of the terms of a sum
};
template <class T, int A, int B> inline void lane_block(Strided<T> x, Strided<T> y, int64_t K, T* c, int64_t c_row, int64_t c_column) {
  Vec<T> sum[A][B] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> some[B];
    for (int b = 0; b < B; ++b) some[b] = load(y.p + b * y.row + k * y.k);
    for (int a = 0; a < A; ++a) {
      const Vec<T> one = load(x.p + a * x.row + k * x.k);
      for (int b = 0; b < B; ++b) sum[a][b] += one * some[b];
    }
  }
  for (int a = 0; a < A; ++a)
    for (int b = 0; b < B; ++b) store(c + a * c_row + b * c_column, sum[a][b]);
}
// c(a, b) = sum over k of x(a, k) y(b, k).
template <class T>
void lane_products(Strided<T> x, Strided<T> y, int64_t A, int64_t B, int64_t K, T* c, int64_t c_row, int64_t c_column) {
  constexpr int wide = block_outs, tall = block_rows;
  for (int64_t a = 0; a < A;) {
    const bool whole = a + wide <= A;
    const Strided<T> xa{x.p + a * x.row, x.row, x.k};
    for (int64_t b = 0; b < B;) {
      const Strided<T> yb{y.p + b * y.row, y.row, y.k};
      T* to = c + a * c_row + b * c_column;
      const bool full = b + tall <= B;
      if (whole && full) lane_block<T, wide, tall>(xa, yb, K, to, c_row, c_column);
      else if (whole) lane_block<T, wide, 1>(xa, yb, K, to, c_row, c_column);
      else if (full) lane_block<T, 1, tall>(xa, yb, K, to, c_row, c_column);
      else lane_block<T, 1, 1>(xa, yb, K, to, c_row, c_column);
      b += full ? tall : 1;
    }
    a += whole ? wide : 1;
  }
}

// --- layer norm ---

// y = (x - mean) / sqrt(variance + eps) gain + shift over the features of a row; moments: mean and 1 / sqrt(...) of every row.
template <class T>
void layer_norm(const T* x, int64_t rows, int64_t width, const T* gain, const T* shift, T eps, T* y, T* moments) {
  for (int64_t r = 0; r < rows; ++r, x += width * lanes<T>, y += width * lanes<T>) {
    Vec<T> sum[4] = {}, square[4] = {};
    for (int64_t i = 0; i < width; ++i) sum[i % 4] += load(x + i * lanes<T>);
    const Vec<T> mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * (T(1) / T(width));
    for (int64_t i = 0; i < width; ++i) {
      const Vec<T> distance = load(x + i * lanes<T>) - mean;
      square[i % 4] += distance * distance;
    }
    const Vec<T> variance = ((square[0] + square[1]) + (square[2] + square[3])) * (T(1) / T(width));
    const Vec<T> scale = T(1) / square_root<T>(variance + eps) + (variance - variance);  // NaN where the variance overflows
    for (int64_t i = 0; i < width; ++i) store(y + i * lanes<T>, (load(x + i * lanes<T>) - mean) * scale * gain[i] + shift[i]);
    store(moments + 2 * r * lanes<T>, mean);
    store(moments + (2 * r + 1) * lanes<T>, scale);
  }
}
// dx = (or +=, with `add`) its gradient; dy is overwritten. d_gain and d_shift may be null.
template <class T>
void layer_norm_gradient(T* dy, const T* x, const T* moments, int64_t rows, int64_t width, const T* gain, bool add, T* dx, T* d_gain, T* d_shift) {
  for (int64_t i = 0; i < width; ++i) {
    Vec<T> gains{}, shifts{};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> d = load(dy + (r * width + i) * lanes<T>), mean = load(moments + 2 * r * lanes<T>), scale = load(moments + (2 * r + 1) * lanes<T>);
      gains += d * (load(x + (r * width + i) * lanes<T>) - mean) * scale;
      shifts += d;
      store(dy + (r * width + i) * lanes<T>, d * gain[i]);
    }
    if (!d_gain) continue;
    d_gain[i] += lane_sum<T>(gains);
    d_shift[i] += lane_sum<T>(shifts);
  }
  for (int64_t r = 0; r < rows; ++r, x += width * lanes<T>, dy += width * lanes<T>, dx += width * lanes<T>) {
    const Vec<T> mean = load(moments + 2 * r * lanes<T>), scale = load(moments + (2 * r + 1) * lanes<T>);
    Vec<T> sum[2] = {}, along[2] = {};
    for (int64_t i = 0; i < width; ++i) {
      const Vec<T> d = load(dy + i * lanes<T>);
      sum[i % 2] += d;
      along[i % 2] += d * (load(x + i * lanes<T>) - mean);
    }
    const Vec<T> centre = (sum[0] + sum[1]) * (T(1) / T(width)), slope = (along[0] + along[1]) * scale * scale * (T(1) / T(width));
    for (int64_t i = 0; i < width; ++i) {
      T* to = dx + i * lanes<T>;
      const Vec<T> d = scale * (load(dy + i * lanes<T>) - centre - slope * (load(x + i * lanes<T>) - mean));
      store(to, add ? load(to) + d : d);
    }
  }
}

// --- activations: value and slope ---

// exp(z^2) erfc(z) for z >= 0: t P(2 t - 1), t = 2.5 / (2.5 + z), P by its Chebyshev series on [0, 1], found with 40 digits; its
// error is 1e-8 in float and 2e-15 in double, rounding apart.
template <class T> inline Vec<T> scaled_erfc(Vec<T> z) {
  constexpr double wide[] = {0.421612728122287223, 0.321860739775659506, 0.181565646659221323, 0.0685004580984283603, 0.0113446200536078859, -0.00335721772143124816, -0.00192751422431071686, 0.00017568331470066574, 0.000281077633314474554, -0.0000233231902676028894, -0.0000450427431317630722, 7.8132101902154404e-6, 7.30063437758553432e-6, -2.70265234229076872e-6, -9.39652088969850815e-7, 7.86789828849404552e-7, 8.06236182135285838e-9, -1.81241967480325635e-7, 4.45322363441937596e-8, 2.93955332902906762e-8, -1.41497543345655603e-8, -2.48788349026735444e-9, 1.78143038612282473e-9};
  constexpr double narrow[] = {0.4216127259, 0.3218607715, 0.1815658105, 0.06849979497, 0.01134267047, -0.00335325275, -0.001918944466, 0.000165569994, 0.0002637163238, -1.080285193e-5, -2.806405168e-5};
  constexpr int degree = sizeof(T) == 4 ? 10 : 22;
  const Vec<T> t = T(2.5) * reciprocal<T>(z + T(2.5)), s = t + t - T(1);
  Vec<T> p = splat<T>(T(sizeof(T) == 4 ? narrow[10] : wide[22]));
  for (int k = degree - 1; k >= 0; --k) p = p * s + T(sizeof(T) == 4 ? narrow[k < 10 ? k : 10] : wide[k]);
  return t * p;
}
// A function's value, and its slope in `slope`: what of the two is not needed costs nothing.
struct Gelu {  // x Phi(x), Phi the normal distribution
  template <class T> static Vec<T> value(Vec<T> x, Vec<T>& slope) {
    Vec<T> z = (x > T(0) ? x : -x) * T(0.70710678118654752440);
    z = z < T(40) ? z : splat<T>(40);
    const Vec<T> bell = exponential<T>(-z * z), tail = bell * scaled_erfc<T>(z) * T(0.5), below = x > T(0) ? T(1) - tail : tail;
    slope = below + x * bell * T(0.39894228040143267794);
    return x * below;
  }
};
struct Relu {
  template <class T> static Vec<T> value(Vec<T> x, Vec<T>& slope) {
    slope = x > T(0) ? splat<T>(1) : Vec<T>{};
    return x > T(0) ? x : x == x ? Vec<T>{} : x;
  }
};
struct Tanh {
  template <class T> static Vec<T> value(Vec<T> x, Vec<T>& slope) {
    const Vec<T> e = exponential<T>((x > T(0) ? x : -x) * T(-2)), t = (T(1) - e) * reciprocal<T>(T(1) + e), y = x > T(0) ? t : x == x ? -t : x;
    slope = T(1) - y * y;
    return y;
  }
};
struct Silu {  // x / (1 + exp(-x))
  template <class T> static Vec<T> value(Vec<T> x, Vec<T>& slope) {
    Vec<T> z = x > T(87) ? splat<T>(-87) : -x;
    z = z > T(80) ? splat<T>(80) : z;
    Vec<T> s = reciprocal<T>(T(1) + exponential_within<T>(z));
    s = x < T(-80) ? Vec<T>{} : s;  // so that x times it is 0, too
    slope = s * (T(1) + x * (T(1) - s));  // without x s: a sum of values rounds alike, with slopes and without
    return x * s;
  }
};
template <class F, class T> inline Vec<T> value_of(Vec<T> x) {
  Vec<T> slope;
  return F::template value<T>(x, slope);
}
template <class F, class T> inline Vec<T> slope_of(Vec<T> x) {
  Vec<T> slope;
  F::template value<T>(x, slope);
  return slope;
}
// f(Tanh) or whichever it is
template <class F> void with_activation(int64_t which, F f) {
  switch (which) {
    case tanh_activation: return f(Tanh{});
    case relu_activation: return f(Relu{});
    case gelu_activation: return f(Gelu{});
    default: return f(Silu{});
  }
}
template <class F, class T> void activate(const T* x, int64_t count, T* y) {
  for (int64_t i = 0; i < count; ++i) store(y + i * lanes<T>, value_of<F, T>(load(x + i * lanes<T>)));
}
// dy times the slope at x, in place of dy
template <class F, class T> void activation_gradient(const T* x, int64_t count, T* dy) {
  for (int64_t i = 0; i < count; ++i) store(dy + i * lanes<T>, load(dy + i * lanes<T>) * slope_of<F, T>(load(x + i * lanes<T>)));
}
// The two together before a gradient: y is the value, and `slopes` the slopes, which may be in the place of x.
template <class F, class T> void activate_with_slopes(const T* x, int64_t count, T* y, T* slopes) {
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> slope;
    store(y + i * lanes<T>, F::template value<T>(load(x + i * lanes<T>), slope));
    store(slopes + i * lanes<T>, slope);
  }
}
// dy times the slopes, in place of dy
template <class T> void times_slopes(const T* slopes, int64_t count, T* dy) {
  for (int64_t i = 0; i < count; ++i) store(dy + i * lanes<T>, load(dy + i * lanes<T>) * load(slopes + i * lanes<T>));
}

// --- softmax ---

// softmax(scale s) over `keys` values of every row, in place; lane l counts its first length[l] keys, all if length is null.
template <class T> void softmax(T* s, int64_t rows, int64_t keys, T scale, const typename Lanes<T>::Int* length) {
  for (int64_t r = 0; r < rows; ++r, s += keys * lanes<T>) {
    if (length)
      for (int64_t k = 0; k < keys; ++k) {
        const IntVec<T> valid = (IntVec<T>{} + typename Lanes<T>::Int(k)) < load(length);
        store(s + k * lanes<T>, valid ? load(s + k * lanes<T>) : splat<T>(std::numeric_limits<T>::lowest()));
      }
    Vec<T> most = load(s), sum{};
    for (int64_t k = 1; k < keys; ++k) {
      const Vec<T> x = load(s + k * lanes<T>);
      most = x > most ? x : most;
    }
    for (int64_t k = 0; k < keys; ++k) {
      const Vec<T> e = exponential<T>((load(s + k * lanes<T>) - most) * scale);
      store(s + k * lanes<T>, e);
      sum += e;
    }
    const Vec<T> by = T(1) / sum;
    for (int64_t k = 0; k < keys; ++k) store(s + k * lanes<T>, load(s + k * lanes<T>) * by);
  }
}
// From the gradient d of the softmax p to that of the scores, in place of d.
template <class T> void softmax_gradient(const T* p, T* d, int64_t rows, int64_t keys, T scale) {
  for (int64_t r = 0; r < rows; ++r, p += keys * lanes<T>, d += keys * lanes<T>) {
    Vec<T> sum{};
    for (int64_t k = 0; k < keys; ++k) sum += load(p + k * lanes<T>) * load(d + k * lanes<T>);
    for (int64_t k = 0; k < keys; ++k) store(d + k * lanes<T>, load(p + k * lanes<T>) * (load(d + k * lanes<T>) - sum) * scale);
  }
}
