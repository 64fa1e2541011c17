// Vectors of PSF_VECTOR_BYTES, samples side by side. Included by each_isa.h inside a namespace per instruction set.

template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(PSF_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(PSF_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(PSF_VECTOR_BYTES)));
  typedef int32_t Int;
  static constexpr int exp_degree = 7, log_terms = 5, mantissa_bits = 23, exponent_bias = 127;
  static constexpr float exp_min = -87.0f, exp_max = 88.7f, negligible = 1e-30f, sqrt_half = 0.70710678f;
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(PSF_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(PSF_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(PSF_VECTOR_BYTES)));
  typedef int64_t Int;
  static constexpr int exp_degree = 13, log_terms = 11, mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double exp_min = -708.0, exp_max = 709.7, negligible = 1e-200, sqrt_half = 0.70710678118654752440;
};
template <class T> using Vec = typename Lanes<T>::V;
template <class T> using IntVec = typename Lanes<T>::I;
template <class T> constexpr int lanes = PSF_VECTOR_BYTES / sizeof(T);

template <class T> inline Vec<T> splat(T x) { return Vec<T>{} + x; }
// whole + x has no fractional bits: its bits minus those of `whole` are x as an integer.
template <class T> constexpr T whole = T(1.5) * T(int64_t(1) << Lanes<T>::mantissa_bits);

template <class V> inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }
inline IntVec<float> load(const int32_t* p) { return load_as<IntVec<float>>(p); }
inline IntVec<double> load(const int64_t* p) { return load_as<IntVec<double>>(p); }
template <class P, class V> inline void store(P* p, V v) { std::memcpy(p, &v, sizeof v); }

// 1 / x for normal x.
template <class T> inline Vec<T> reciprocal(Vec<T> x) { return T(1) / x; }
#if defined(PSF_AVX512)
template <> inline Vec<float> reciprocal<float>(Vec<float> x) {  // 14 bits, then one Newton step
  const Vec<float> y = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return y + y * (1.0f - x * y);
}
#endif

// An instruction where there is one: a loop over std::sqrt, which may set errno, stays a loop.
template <class T> inline Vec<T> square_root(Vec<T> x) {
#if defined(__x86_64__)
  constexpr bool single = sizeof(T) == 4;
#if PSF_VECTOR_BYTES == 64
  if constexpr (single) return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  else return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif PSF_VECTOR_BYTES == 32
  if constexpr (single) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
  if constexpr (single) return (Vec<T>)_mm_sqrt_ps((__m128)x);
  else return (Vec<T>)_mm_sqrt_pd((__m128d)x);
#endif
#else
  for (int l = 0; l < lanes<T>; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}

// exp(x) for exp_min <= x <= exp_max. x = k ln 2 + y, |y| <= ln(2)/2, exp(y) by its series.
template <class T> inline Vec<T> exponential_within(Vec<T> x) {
  using L = Lanes<T>;
  constexpr T log2e = T(1.44269504088896340736), ln2_high = T(0.693145751953125), ln2_low = T(1.42860682030941723212e-6);
  constexpr T inverse_factorial[] = {T(1), T(1), T(1.0 / 2), T(1.0 / 6), T(1.0 / 24), T(1.0 / 120), T(1.0 / 720), T(1.0 / 5040), T(1.0 / 40320),
                                     T(1.0 / 362880), T(1.0 / 3628800), T(1.0 / 39916800), T(1.0 / 479001600), T(1.0 / 6227020800)};
  const Vec<T> rounded = x * log2e + whole<T>, kf = rounded - whole<T>;
  const Vec<T> y = x - kf * ln2_high - kf * ln2_low;
  Vec<T> p = splat<T>(inverse_factorial[L::exp_degree]);
  for (int i = L::exp_degree - 1; i >= 0; --i) p = p * y + inverse_factorial[i];
  // The exponent's bits of `whole` are shifted out, its others are k.
  return p * (Vec<T>)(((IntVec<T>)rounded + typename L::Int(L::exponent_bias)) << L::mantissa_bits);
}
// exp(x); exactly 0 below the smallest normal number.
template <class T> inline Vec<T> exponential(Vec<T> x) {
  using L = Lanes<T>;
  const IntVec<T> tiny = x < L::exp_min;
  Vec<T> safe = tiny ? Vec<T>{} : x;
  safe = safe > L::exp_max ? splat<T>(L::exp_max) : safe;
  return tiny ? Vec<T>{} : exponential_within<T>(safe);
}

// log(x) for normal x > 0. x = m 2^k, sqrt(1/2) <= m < sqrt(2), log m = 2 artanh((m - 1) / (m + 1)) by its series.
template <class T> inline Vec<T> log_positive(Vec<T> x) {
  using L = Lanes<T>;
  using Int = typename L::Int;
  constexpr T ln2_high = T(0.693145751953125), ln2_low = T(1.42860682030941723212e-6);
  IntVec<T> bits = (IntVec<T>)x;
  IntVec<T> k = (IntVec<T>)((typename L::U)bits >> L::mantissa_bits) - Int(L::exponent_bias - 1);
  Vec<T> m = (Vec<T>)((bits & ((Int(1) << L::mantissa_bits) - 1)) | (Int(L::exponent_bias - 1) << L::mantissa_bits));
  IntVec<T> low = m < L::sqrt_half;  // m in [1/2, 1)
  m = low ? m + m : m;
  k += low;
  const Vec<T> kf = (Vec<T>)((IntVec<T>)splat(whole<T>) + k) - whole<T>;
  Vec<T> s = (m - T(1)) * reciprocal<T>(m + T(1)), z = s * s, p = splat<T>(T(1) / (2 * L::log_terms + 1));
  for (int i = L::log_terms - 1; i >= 0; --i) p = p * z + T(1.0 / (2 * i + 1));
  return kf * ln2_high + (kf * ln2_low + T(2) * s * p);
}

// Lanes shifted by constant distances. exchange: lane l takes lane l ^ x. from_left: lane l takes lane l - x, 0 comes in;
// from_right: lane l takes lane l + x.
template <int x, class V, int... l> inline V exchange(V v, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(v, v, (l ^ x)...);
}
template <int x, class V, int... l> inline V from_left(V v, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(v, V{}, (l < x ? int(sizeof...(l)) : l - x)...);
}
template <int x, class V, int... l> inline V from_right(V v, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(v, V{}, (l + x < int(sizeof...(l)) ? l + x : int(sizeof...(l)))...);
}
template <class V> using LaneNumbers = std::make_integer_sequence<int, PSF_VECTOR_BYTES / int(sizeof(V{}[0]))>;
template <int x, class V> inline V exchange(V v) { return exchange<x>(v, LaneNumbers<V>{}); }
template <int x, class V> inline V from_left(V v) { return from_left<x>(v, LaneNumbers<V>{}); }
template <int x, class V> inline V from_right(V v) { return from_right<x>(v, LaneNumbers<V>{}); }

// Slot i of v becomes lane i of all slots. Interleaving the first with the second half does it in log2(lanes) rounds.
template <class V, int... l> inline void interleave(const V* in, V* out, std::integer_sequence<int, l...>) {
  constexpr int L = sizeof...(l);
  for (int i = 0; i < L / 2; ++i) {
    out[2 * i] = __builtin_shufflevector(in[i], in[i + L / 2], (l / 2 + (l % 2) * L)...);
    out[2 * i + 1] = __builtin_shufflevector(in[i], in[i + L / 2], (L / 2 + l / 2 + (l % 2) * L)...);
  }
}
template <class V> inline void transpose(V* v) {
  constexpr int L = PSF_VECTOR_BYTES / sizeof(v[0][0]);
  V other[L];
  for (int width = 1; width < L; width *= 4) {
    interleave(v, other, LaneNumbers<V>{});
    if (width * 2 < L) {
      interleave(other, v, LaneNumbers<V>{});
    } else {
      for (int i = 0; i < L; ++i) v[i] = other[i];
    }
  }
}

// Row-major values side by side: lane l of out[j] is in[start[l] + j], 0 from count[l] on.
template <class E> inline void load_lanes(const E* in, const int64_t* start, const int64_t* count, int64_t slots, E* out) {
  constexpr int L = PSF_VECTOR_BYTES / sizeof(E);
  using V = decltype(load(in));
  for (int64_t j = 0; j < slots; j += L) {
    V v[L];
    for (int l = 0; l < L; ++l) {
      const int64_t left = count[l] - j;
      if (left >= L) {
        v[l] = load(in + start[l] + j);
      } else {
        v[l] = V{};
        if (left > 0) std::memcpy(&v[l], in + start[l] + j, left * sizeof(E));
      }
    }
    transpose(v);
    for (int64_t i = 0; i < L && j + i < slots; ++i) store(out + (j + i) * L, v[i]);
  }
}
// The inverse; leaves invalid entries unchanged.
template <class E> inline void store_lanes(E* out, const int64_t* start, const int64_t* count, int64_t slots, const E* in) {
  constexpr int L = PSF_VECTOR_BYTES / sizeof(E);
  using V = decltype(load(in));
  for (int64_t j = 0; j < slots; j += L) {
    V v[L];
    for (int64_t i = 0; i < L; ++i) v[i] = j + i < slots ? load(in + (j + i) * L) : V{};
    transpose(v);
    for (int l = 0; l < L; ++l) {
      const int64_t left = count[l] - j;
      if (left >= L) {
        store(out + start[l] + j, v[l]);
      } else if (left > 0) {
        std::memcpy(out + start[l] + j, &v[l], left * sizeof(E));
      }
    }
  }
}

// A tile's rows, padded with zeros.
template <class T> inline void load_tile(const Tile<T>& tile, const T* in, T* out) {
  load_lanes(in, tile.start, tile.count, tile.slots, out);
}
template <class T> inline void store_tile(const Tile<T>& tile, T* out, const T* in) {
  store_lanes(out, tile.start, tile.count, tile.slots, in);
  for (int row = 0; row < tile.rows; ++row)
    for (int64_t j = tile.nodes[row]; j < tile.N; ++j) out[row * tile.N + j] = T(0);
}
// In every lane the sum, or the largest, over the lanes of its row.
template <class T> inline Vec<T> row_sums(const Tile<T>& tile, Vec<T> x) {
  Vec<T> sums{};
  for (int l = 0; l < lanes<T>; ++l)
    for (int s = 0; s < tile.segments; ++s) sums[l] += x[l / tile.segments * tile.segments + s];
  return sums;
}
template <class T> inline Vec<T> row_largest(const Tile<T>& tile, Vec<T> x) {
  Vec<T> largest = x;
  for (int l = 0; l < lanes<T>; ++l)
    for (int s = 0; s < tile.segments; ++s) {
      const T other = x[l / tile.segments * tile.segments + s];
      largest[l] = other > largest[l] ? other : largest[l];
    }
  return largest;
}

// Up to `lanes` rows of a row-major (rows, N) matrix side by side: lane l of out[j] is row[l * N + j], 0 from count[l] on;
// absent lanes repeat the first. n: the largest count.
template <class T> inline void load_rows(const T* row, int64_t N, const int64_t* count, int rows, int64_t n, T* out) {
  int64_t start[lanes<T>];
  for (int l = 0; l < lanes<T>; ++l) start[l] = (l < rows ? l : 0) * N;
  load_lanes(row, start, count, n, out);
}
// The way back: row[l * N + j] is lane l of in[j], 0 from count[l] on.
template <class T> inline void store_rows(T* row, int64_t N, const int64_t* count, int rows, const T* in) {
  int64_t start[lanes<T>], valid[lanes<T>], n = 0;
  for (int l = 0; l < lanes<T>; ++l) {
    start[l] = l * N;
    valid[l] = l < rows ? count[l] : 0;
    n = valid[l] > n ? valid[l] : n;
  }
  store_lanes(row, start, valid, n, in);
  for (int l = 0; l < rows; ++l)
    for (int64_t j = count[l]; j < N; ++j) row[l * N + j] = T(0);
}
