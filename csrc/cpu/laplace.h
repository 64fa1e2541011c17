// Products with the Laplacian kernel K[i, j] = exp(-|t_i - t_j| / tau) of one sorted vector t, in two scans of n:
//   f_i = v_i + a_i f_{i-1},  b_i = v_i + a_{i+1} b_{i+1},  K v = f + b - v,  (sgn o K) v = b - f,
// with a_i = exp(-(t_{i-1} - t_i) / tau), 0 at the ends. Every array holds the n slots of a tile's lanes side by side.
// A slot with a_i = a_{i+1} = 0 is isolated: padding consists of such slots and needs no masks.
// A lane's own scan differs from its row's scan by what enters from the neighbouring lane, times the decays up to the slot.

#include "../laplace_steps.h"

constexpr int laplace_arrays = 4;

template <class T> struct Laplace {
  int64_t n;
  int segments;
  T *a, *d;          // n + 1 slots: decays and scaled gaps (t_{i-1} - t_i) / tau, 0 where a is; a_n is the right lane's a_0
  T *head, *tail;    // head_i = a_1 ... a_i, tail_i = a_{i+1} ... a_{n-1}: decays to the lane's first and last slot
  Vec<T> left[3], right[3];  // decays across 1, 2 and 4 whole lanes

  Laplace(const Tile<T>& tile, const T* t, T tau, T* scratch) : n(tile.slots), segments(tile.segments) {
    constexpr int L = lanes<T>;
    const int64_t step = (n + 1) * L;
    a = scratch, d = a + step, head = d + step, tail = head + step;
    Vec<T> valid{}, inner{};  // inner: the row continues to the left of the lane
    for (int l = 0; l < L; ++l) valid[l] = static_cast<T>(tile.count[l]);
    for (int l = 0; l < L; ++l) inner[l] = static_cast<T>(l % segments);
    const Vec<T> by_tau = splat<T>(1) / splat<T>(tau);
    Vec<T> before = from_left<1>(load(t + (n - 1) * L)), product = splat<T>(1);
    for (int64_t i = 0; i < n; ++i) {
      const Vec<T> here = load(t + i * L), gap = (before - here) * by_tau;
      Vec<T> decay = exponential<T>(-gap);
      decay = splat<T>(static_cast<T>(i)) < valid ? decay : Vec<T>{};  // the gap is arbitrary in the padding
      if (i == 0) decay = inner > T(0) ? decay : Vec<T>{};
      if (i > 0) product = product * decay;
      product = product > Lanes<T>::negligible ? product : Vec<T>{};
      store(a + i * L, decay);
      store(d + i * L, decay > T(0) ? gap : Vec<T>{});
      store(head + i * L, product);
      before = here;
    }
    store(a + n * L, from_right<1>(load(a)));
    store(d + n * L, from_right<1>(load(d)));
    left[0] = load(a) * product;
    right[0] = load(a + n * L) * product;
    left[1] = left[0] * from_left<1>(left[0]);
    right[1] = right[0] * from_right<1>(right[0]);
    left[2] = left[1] * from_left<2>(left[1]);
    right[2] = right[1] * from_right<2>(right[1]);
    product = splat<T>(1);
    for (int64_t i = n - 1; i >= 0; --i) {
      store(tail + i * L, product);
      product = product * load(a + i * L);
      product = product > Lanes<T>::negligible ? product : Vec<T>{};
    }
  }

  // f at the last slot of the lane to the left, from each lane's own sum over tail_i v_i.
  Vec<T> enters_left(Vec<T> sum) const {
    if (segments > 1) sum += left[0] * from_left<1>(sum);
    if (segments > 2) sum += left[1] * from_left<2>(sum);
    if (segments > 4) sum += left[2] * from_left<4>(sum);
    return from_left<1>(sum);
  }
  // b at the first slot of the lane to the right, from each lane's own sum over head_i v_i.
  Vec<T> enters_right(Vec<T> sum) const {
    if (segments > 1) sum += right[0] * from_right<1>(sum);
    if (segments > 2) sum += right[1] * from_right<2>(sum);
    if (segments > 4) sum += right[2] * from_right<4>(sum);
    return from_right<1>(sum);
  }
};

// A vector v between two passes: its values, its scan within each lane in the direction of the last pass, and each lane's
// sums of head_i v_i and tail_i v_i.
template <class T> struct Scanned {
  T *v, *scan;
  Vec<T> to_first, to_last;
};

// One pass over the slots finishes the product of K with v and starts that with next(i, v_i, (K v)_i, ((sgn o K) v)_i),
// which it stores at `out`. up: in ascending order of slots, after a descending pass; else the reverse.
// whole: every lane holds a whole row, so nothing enters from its neighbours.
template <bool up, bool whole, class T, class Next> inline void pass_of(const Laplace<T>& K, Scanned<T>& x, T* out, const Next& next) {
  constexpr int L = lanes<T>;
  const T *a = up ? K.a : K.a + L, *to_other = up ? K.tail : K.head, *to_begin = up ? K.head : K.tail;
  const Vec<T> from_first = load(K.a) * K.enters_left(x.to_last), from_last = load(K.a + K.n * L) * K.enters_right(x.to_first);
  Vec<T> f{}, g{}, sum{};
  if (!whole) f = up ? K.enters_left(x.to_last) : K.enters_right(x.to_first);
  const Vec<T> other = up ? from_last : from_first;
  for (int64_t k = 0; k < K.n; ++k) {
    const int64_t i = (up ? k : K.n - 1 - k) * L;
    const Vec<T> ai = load(a + i), v = load(x.v + i), b = whole ? load(x.scan + i) : load(x.scan + i) + load(to_other + i) * other;
    f = v + ai * f;
    const Vec<T> y = next(i, v, f + b - v, up ? b - f : f - b);
    g = y + ai * g;
    if (!whole) sum += load(to_begin + i) * y;
    store(out + i, y);
    store(x.scan + i, g);
  }
  x.v = out;
  x.to_first = up ? sum : g;
  x.to_last = up ? g : sum;
}
template <bool up, class T, class Next> inline void pass(const Laplace<T>& K, Scanned<T>& x, T* out, const Next& next) {
  if (K.segments == 1) {
    pass_of<up, true>(K, x, out, next);
  } else {
    pass_of<up, false>(K, x, out, next);
  }
}

// Prepares x for a first ascending pass.
template <class T> inline void begin(const Laplace<T>& K, Scanned<T>& x) {
  constexpr int L = lanes<T>;
  Vec<T> b{}, sum{};
  for (int64_t i = K.n - 1; i >= 0; --i) {
    const Vec<T> v = load(x.v + i * L);
    b = v + load(K.a + (i + 1) * L) * b;
    sum += load(K.tail + i * L) * v;
    store(x.scan + i * L, b);
  }
  x.to_first = b;
  x.to_last = sum;
}

template <class T, bool keep> struct Invert {
  T* sgn;
  __attribute__((always_inline)) Vec<T> operator()(int64_t i, Vec<T>, Vec<T> product, Vec<T> signed_product) const {
    if (keep) store(sgn + i, signed_product);
    return reciprocal<T>(product);
  }
};

// The iterations x_m = 1 / (K x_{m-1}) from x_0 = 1: r is x_m for odd m, c for even m. `vectors` holds x_m at m * step, and
// (sgn o K) x_m follows x_m at m * step + step / 2; without `keep` it holds the last two x_m only, at (m % 2) * step.
template <bool keep, class T> inline void sinkhorn(const Laplace<T>& K, int iterations, T* vectors, int64_t step, T* scan) {
  constexpr int L = lanes<T>;
  for (int64_t i = 0; i < K.n; ++i) {
    store(vectors + i * L, splat<T>(1));
    store(vectors + step + i * L, splat<T>(1));
  }
  Scanned<T> x{vectors, scan, {}, {}};
  begin(K, x);
  for (int m = 0; m < 2 * iterations; m += 2) {
    T *even = vectors + (keep ? m * step : 0), *odd = even + step;
    pass<true>(K, x, odd, Invert<T, keep>{even + step / 2});
    pass<false>(K, x, keep ? odd + step : even, Invert<T, keep>{odd + step / 2});
  }
}
