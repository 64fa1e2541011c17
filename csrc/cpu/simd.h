// Vectors of 64 bytes: one sample a lane. Included by each_isa.h inside a namespace per instruction set.

template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef int32_t Int;
  static constexpr int exp_degree = 7, log_terms = 5, mantissa_bits = 23, exponent_bias = 127;
  static constexpr float exp_min = -87.0f, sqrt_half = 0.70710678f;
};
template <> struct Lanes<double> {
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t I __attribute__((vector_size(64)));
  typedef int64_t Int;
  static constexpr int exp_degree = 13, log_terms = 11, mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double exp_min = -708.0, sqrt_half = 0.70710678118654752440;
};
template <class T> using Vec = typename Lanes<T>::V;
template <class T> using IntVec = typename Lanes<T>::I;
template <class T> constexpr int lanes = 64 / sizeof(T);

template <class T> inline Vec<T> splat(T x) { return Vec<T>{} + x; }

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

// exp(x) for x <= 0; exactly 0 below the smallest normal number. x = k ln 2 + y, |y| <= ln(2)/2, exp(y) by its series.
template <class T> inline Vec<T> exp_nonpositive(Vec<T> x) {
  using L = Lanes<T>;
  constexpr T log2e = T(1.44269504088896340736), ln2_high = T(0.693145751953125), ln2_low = T(1.42860682030941723212e-6);
  IntVec<T> tiny = x < L::exp_min;
  Vec<T> safe = tiny ? Vec<T>{} : x;
  IntVec<T> k = __builtin_convertvector(safe * log2e - T(0.5), IntVec<T>);
  Vec<T> kf = __builtin_convertvector(k, Vec<T>);
  Vec<T> y = safe - kf * ln2_high - kf * ln2_low;
  Vec<T> p = splat<T>(1);
  for (int i = L::exp_degree; i > 0; --i) p = p * (y * T(1.0 / i)) + T(1);
  Vec<T> scale = (Vec<T>)((k + typename L::Int(L::exponent_bias)) << L::mantissa_bits);
  return tiny ? Vec<T>{} : p * scale;
}

template <class T> inline Vec<T> exp_any(Vec<T> x) {
  const IntVec<T> positive = x > T(0);
  const Vec<T> e = exp_nonpositive<T>(positive ? -x : x);
  return positive ? T(1) / e : e;
}

// log(x) for normal x > 0. x = m 2^k, sqrt(1/2) <= m < sqrt(2), log m = 2 artanh((m - 1) / (m + 1)) by its series.
template <class T> inline Vec<T> log_positive(Vec<T> x) {
  using L = Lanes<T>;
  using Int = typename L::Int;
  constexpr T ln2_high = T(0.693145751953125), ln2_low = T(1.42860682030941723212e-6);
  IntVec<T> bits = (IntVec<T>)x;
  IntVec<T> k = (bits >> L::mantissa_bits) - Int(L::exponent_bias - 1);
  Vec<T> m = (Vec<T>)((bits & ((Int(1) << L::mantissa_bits) - 1)) | (Int(L::exponent_bias - 1) << L::mantissa_bits));
  IntVec<T> low = m < L::sqrt_half;  // m in [1/2, 1)
  m = low ? m + m : m;
  k += low;
  Vec<T> kf = __builtin_convertvector(k, Vec<T>);
  Vec<T> s = (m - T(1)) / (m + T(1)), z = s * s, p = splat<T>(T(1) / (2 * L::log_terms + 1));
  for (int i = L::log_terms - 1; i >= 0; --i) p = p * z + T(1.0 / (2 * i + 1));
  return kf * ln2_high + (kf * ln2_low + T(2) * s * p);
}

// Up to `lanes` rows of a row-major (rows, N) matrix side by side: lane l of out[j] is row[l * N + j], 0 from count[l] on;
// absent lanes repeat the first. n: the largest count.
template <class T> inline void load_rows(const T* row, int64_t N, const int64_t* count, int rows, int64_t n, T* out) {
  for (int l = 0; l < lanes<T>; ++l) {
    const T* p = row + (l < rows ? l : 0) * N;
    for (int64_t j = 0; j < count[l]; ++j) out[j * lanes<T> + l] = p[j];
    for (int64_t j = count[l]; j < n; ++j) out[j * lanes<T> + l] = T(0);
  }
}
// The way back: row[l * N + j] is lane l of in[j], 0 from count[l] on.
template <class T> inline void store_rows(T* row, int64_t N, const int64_t* count, int rows, const T* in) {
  for (int l = 0; l < rows; ++l) {
    for (int64_t j = 0; j < count[l]; ++j) row[l * N + j] = in[j * lanes<T> + l];
    for (int64_t j = count[l]; j < N; ++j) row[l * N + j] = T(0);
  }
}
template <class T> inline int64_t largest(const int64_t* count) {
  int64_t n = 0;
  for (int l = 0; l < lanes<T>; ++l) n = count[l] > n ? count[l] : n;
  return n;
}
