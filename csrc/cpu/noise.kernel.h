// Random numbers from counters, n at a time. Every number is computed by itself in the same instructions, so that it depends
// neither on its place in a vector nor on the threads. Made for each_isa.h.

using Counter = typename Lanes<double>::U;

inline Counter load_counter(const uint64_t* p) { return load_as<Counter>(p); }

// The finalizer of SplitMix64 (Steele et al. 2014), its upper 32 bits.
inline Counter random_bits(Counter x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return (x ^ x >> 31) >> 32;
}

// Exact, for x < 2^52: x in the digits of a double of exponent 52.
inline Vec<double> whole_number(Counter x) { return (Vec<double>)(x | 0x4330000000000000u) - 0x1p52; }

// cos(2 pi bits / 2^32): subtracts the nearest quarter turn exactly, then uses the series of cos and sin.
inline Vec<double> cosine_of_turn(Counter bits) {
  const Counter quarter = (bits + (uint64_t(1) << 29)) >> 30;
  const Vec<double> rest = whole_number(bits) - whole_number(quarter << 30);
  const Vec<double> x = rest * (6.283185307179586476925 * 0x1p-32), z = x * x;
  Vec<double> cosine = splat<double>(1), sine = splat<double>(1);
  for (int i = 8; i > 0; --i) {
    cosine = 1.0 - cosine * z * (1.0 / ((2 * i - 1) * (2 * i)));
    sine = 1.0 - sine * z * (1.0 / ((2 * i) * (2 * i + 1)));
  }
  const Vec<double> value = (quarter & 1) != 0 ? x * sine : cosine;  // cos(y + pi/2) = -sin y
  return ((quarter + 1) & 2) != 0 ? -value : value;
}

// counters: n rounded up to whole vectors. flip: per number 0, or 2^32 - 1 if it is mirrored.
// U[0, 1), mirrored 1 - 2^-32 - u.
void uniform_numbers(const uint64_t* counters, const uint64_t* flip, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i += lanes<double>)
    store(out + i, whole_number(random_bits(load_counter(counters + i)) ^ load_counter(flip + i)) * 0x1p-32);
}

// N(0, 1) by Box and Muller, sqrt(-2 log(1 - u)) cos(2 pi v), mirrored -z.
void normal_numbers(const uint64_t* radius, const uint64_t* angle, const uint64_t* flip, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i += lanes<double>) {
    const Vec<double> left = whole_number((uint64_t(1) << 32) - random_bits(load_counter(radius + i))) * 0x1p-32;  // 1 - u
    const Vec<double> z = square_root<double>(log_positive<double>(left) * -2.0) * cosine_of_turn(random_bits(load_counter(angle + i)));
    store(out + i, load_counter(flip + i) != 0 ? -z : z);
  }
}
