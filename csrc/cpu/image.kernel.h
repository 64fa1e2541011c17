// Between images in memory (image.h) and patches. For each_isa.h, after vectors.h.

// The channels of a pixel that are read at once.
template <class T, int count> struct PixelOf {
  typedef T V __attribute__((vector_size(count * sizeof(T))));
  typedef typename Lanes<T>::Int Mask __attribute__((vector_size(count * sizeof(T))));
  static V load(const T* p) { return load_as<V>(p); }

  // A pixel and the next, in one register where it is wide enough.
  typedef T Pair __attribute__((vector_size(2 * count * sizeof(T))));
  static Pair load_pair(const T* p) { return load_as<Pair>(p); }
  template <int... l> static V half(Pair v, int first, std::integer_sequence<int, l...>) {
    return first ? __builtin_shufflevector(v, v, (l + count)...) : __builtin_shufflevector(v, v, l...);
  }
  static V left(Pair v) { return half(v, 0, std::make_integer_sequence<int, count>{}); }
  static V right(Pair v) { return half(v, 1, std::make_integer_sequence<int, count>{}); }
};

// f with the number of channels at a time, and whether these are all.
template <class F> inline void with_pixel(const Images& x, F f) {
  switch (x.channels()) {
    case 1: return f(std::integral_constant<int, 1>(), std::true_type());
    case 2: return f(std::integral_constant<int, 2>(), std::true_type());
    case 4: return f(std::integral_constant<int, 4>(), std::true_type());
    default: f(std::integral_constant<int, 4>(), std::false_type());
  }
}

// (C, H, W) -> (H + 4, W + 4, channels), with the border that pad_mode gives.
template <class T> void read_image(const Images& x, const T* pixels, T* image) {
  const int64_t n = x.channels(), b = image_border;
  if (!x.replicate || n > x.C) std::memset(image, 0, x.values() * sizeof(T));
  for (int64_t c = 0; c < x.C; ++c)
    for (int64_t i = 0; i < x.H; ++i) {
      const T* from = pixels + (c * x.H + i) * x.W;
      T* to = image + (i + b) * x.stride() + b * n + c;
      for (int64_t j = 0; j < x.W; ++j) to[j * n] = from[j];
      for (int64_t j = 1; x.replicate && j <= b; ++j) to[-j * n] = from[0], to[(x.W - 1 + j) * n] = from[x.W - 1];
    }
  for (int64_t i = 0; x.replicate && i < b; ++i) {
    std::memcpy(image + i * x.stride(), image + b * x.stride(), x.stride() * sizeof(T));
    std::memcpy(image + (x.H + b + i) * x.stride(), image + (x.H + b - 1) * x.stride(), x.stride() * sizeof(T));
  }
}

// The transpose: what lies in the border counts at the nearest pixel, or not at all.
template <class T> void write_image(const Images& x, const T* image, T* pixels) {
  const int64_t n = x.channels(), b = image_border;
  if (x.replicate) std::memset(pixels, 0, x.C * x.H * x.W * sizeof(T));
  for (int64_t c = 0; c < x.C; ++c)
    for (int64_t i = x.replicate ? -b : 0; i < x.H + (x.replicate ? b : 0); ++i) {
      const T* from = image + (i + b) * x.stride() + b * n + c;
      T* to = pixels + (c * x.H + std::clamp<int64_t>(i, 0, x.H - 1)) * x.W;
      if (!x.replicate) {
        for (int64_t j = 0; j < x.W; ++j) to[j] = from[j * n];
        continue;
      }
      for (int64_t j = -b; j < x.W + b; ++j) to[std::clamp<int64_t>(j, 0, x.W - 1)] += from[j * n];
    }
}

// Where neighbouring places of a patch's row are read: the upper left pixel of four, and the shares of the right and lower ones.
template <class T> struct Places {
  static constexpr int64_t most = 32;
  typename Lanes<T>::Int at[most];
  T right[most], lower[most];

  // `count` places from (i, j) of the moved image on. The first in float64, the others from there.
  void find(const Images& x, const double* g, int64_t i, int64_t j, int64_t count) {
    const double across = j - 0.5 * (x.W - 1), up = 0.5 * (x.H - 1) - i;
    const Axis column(g[0] * across + g[1] * up + 0.5 * (x.W - 1), g[0], x.W), row(0.5 * (x.H - 1) - g[2] * across - g[3] * up, -g[2], x.H);
    Vec<T> step{};
    for (int l = 0; l < lanes<T>; ++l) step[l] = T(l);
    const typename Lanes<T>::Int wide = x.W + 2 * image_border, first = (row.whole + image_border) * wide + column.whole + image_border;
    for (int64_t k = 0; k < count; k += lanes<T>, step += T(lanes<T>)) {
      Vec<T> share;
      IntVec<T> place = column.at(step, share);
      store(right + k, share);
      place += wide * row.at(step, share) + first;
      store(lower + k, share);
      store(at + k, place);
    }
  }

 private:
  struct Axis {
    int64_t whole;
    T first, step, least, most;
    Axis(double coordinate, double step, int64_t size)
        : whole(coordinate > -image_border ? static_cast<int64_t>(std::floor(std::min(coordinate, double(size)))) : -image_border),
          first(T(coordinate - whole)), step(T(step)), least(T(-image_border - whole)), most(T(size - whole)) {}
    IntVec<T> at(Vec<T> number, Vec<T>& share) const {
      Vec<T> x = first + number * step;
      x = x > least ? x : splat<T>(least);  // and where it is no number
      x = x < most ? x : splat<T>(most);
      IntVec<T> low = __builtin_convertvector(x, IntVec<T>);
      low += __builtin_convertvector(low, Vec<T>) > x;  // a true lane is -1
      share = x - __builtin_convertvector(low, Vec<T>);
      return low;
    }
  };
};

// The first place of a patch's row under a turn, and the step from a place to the next, in pixels of the image in memory.
struct TurnedRow {
  int64_t at, step;
  TurnedRow(const Images& x, int64_t turn, int64_t i, int64_t j) {
    static constexpr int cosine[] = {1, 0, -1, 0}, sine[] = {0, 1, 0, -1};
    const int64_t c = cosine[turn % 4], s = sine[turn % 4], sign = turn < 4 ? 1 : -1, wide = x.W + 2 * image_border;
    const int64_t across = 2 * j - (x.W - 1), up = (x.H - 1) - 2 * i;  // twice the coordinates, so that they are whole
    const int64_t column = (c * across - sign * s * up + (x.W - 1)) / 2, row = ((x.H - 1) - s * across - sign * c * up) / 2;
    at = (row + image_border) * wide + column + image_border;
    step = c - s * wide;
  }
};

// f(sample, first patch of it, count, rows before) for each sample's part of the patches first..end-1.
template <class F> inline void for_each_run(const Images& x, int64_t first, int64_t end, F f) {
  for (int64_t row = first; row < end;) {
    const int64_t sample = row / x.tokens(), patch = row % x.tokens(), count = std::min(end - row, x.tokens() - patch);
    f(sample, patch, count, row - first);
    row += count;
  }
}

// f(i, j, count, offset) for the rows of patches in parts of at most Places::most: they begin at (i, j) of the moved image.
template <class T, class F> inline void for_each_part(const Images& x, int64_t first, int64_t count, F f) {
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = (first + n) / x.columns() * x.P, j = (first + n) % x.columns() * x.Q;
    for (int64_t p = 0; p < x.P; ++p)
      for (int64_t q = 0; q < x.Q; q += Places<T>::most)
        f(i + p, j + q, std::min(Places<T>::most, x.Q - q), n * x.width() + (p * x.Q + q) * x.C);
  }
}

// Patches first.. of a sample from its image -> rows of `out`. A pixel is stored with all its channels, then overwritten by the next.
template <class T> void cut_patches(const Images& x, const T* image, int64_t sample, int64_t first, int64_t count, T* out) {
  with_pixel(x, [&](auto number, auto all) {
    constexpr int many = decltype(number)::value;
    using Pixel = PixelOf<T, many>;
    const int64_t n = all ? many : x.channels(), below = x.stride(), C = x.C;
    Places<T> places;
    for_each_part<T>(x, first, count, [&](int64_t i, int64_t j, int64_t size, int64_t offset) {
      T* to = out + offset;
      if (!x.frames) {
        const TurnedRow row(x, x.turns[sample], i, j);
        const T* from = image + row.at * n;
        for (int64_t k = 0; k < size; ++k, from += row.step * n, to += C)
          for (int64_t c = 0; c < n; c += many) store(to + c, Pixel::load(from + c));
        return;
      }
      places.find(x, x.frames + 4 * sample, i, j, size);
      for (int64_t k = 0; k < size; ++k, to += C)
        for (int64_t c = 0; c < n; c += many) {
          const T* from = image + places.at[k] * n + c;
          if (all) {
            const auto upper = Pixel::load_pair(from), both = upper + places.lower[k] * (Pixel::load_pair(from + below) - upper);
            const auto left = Pixel::left(both);
            store(to, left + places.right[k] * (Pixel::right(both) - left));
            continue;
          }
          const auto a = Pixel::load(from), b = Pixel::load(from + n);
          const auto left = a + places.lower[k] * (Pixel::load(from + below) - a), right = b + places.lower[k] * (Pixel::load(from + below + n) - b);
          store(to + c, left + places.right[k] * (right - left));
        }
    });
  });
}

// The transpose: adds the gradients of patches to that of the sample's image.
template <class T> void spread_patches(const Images& x, const T* d, int64_t sample, int64_t first, int64_t count, T* image) {
  with_pixel(x, [&](auto number, auto all) {
    constexpr int many = decltype(number)::value;
    using Pixel = PixelOf<T, many>;
    const int64_t n = all ? many : x.channels(), below = x.stride(), C = x.C;
    const auto add = [](T* p, typename Pixel::V v) { store(p, Pixel::load(p) + v); };
    Places<T> places;
    for_each_part<T>(x, first, count, [&](int64_t i, int64_t j, int64_t size, int64_t offset) {
      const T* from = d + offset;
      if (!x.frames) {
        const TurnedRow row(x, x.turns[sample], i, j);
        T* to = image + row.at * n;
        for (int64_t k = 0; k < size; ++k, from += C, to += row.step * n)
          for (int64_t c = 0; c < n; c += many) add(to + c, Pixel::load(from + c));
        return;
      }
      places.find(x, x.frames + 4 * sample, i, j, size);
      for (int64_t k = 0; k < size; ++k, from += C)
        for (int64_t c = 0; c < n; c += many) {
          T* to = image + places.at[k] * n + c;
          const auto v = Pixel::load(from + c), low = places.lower[k] * v, high = v - low;
          const auto high_right = places.right[k] * high, low_right = places.right[k] * low;
          add(to, high - high_right);
          add(to + n, high_right);
          add(to + below, low - low_right);
          add(to + below + n, low_right);
        }
    });
  });
}

// Adds the gradient of a sample's matrix: with (x, y) a place, d_column and d_row the gradients of where it reads,
//   d_g += ((sum d_column x, sum d_column y), (-sum d_row x, -sum d_row y)).
template <class T>
void frame_gradient(const Images& x, const T* d, const T* image, int64_t sample, int64_t first, int64_t count, double* d_frame) {
  with_pixel(x, [&](auto number, auto all) {
    constexpr int many = decltype(number)::value;
    using Pixel = PixelOf<T, many>;
    using V = typename Pixel::V;
    const int64_t n = all ? many : x.channels(), below = x.stride(), C = x.C;
    const auto total = [&](V v) {
      double sum = 0;
      for (int l = 0; l < many; ++l) sum += v[l];
      return sum;
    };
    typename Pixel::Mask given{};  // of the last channels; then come those of the next pixel
    for (int l = 0; l < many; ++l) given[l] = n - many + l < C ? -1 : 0;
    Places<T> places;
    for_each_part<T>(x, first, count, [&](int64_t i, int64_t j, int64_t size, int64_t offset) {
      places.find(x, x.frames + 4 * sample, i, j, size);
      V columns{}, rows{}, columns_x{}, rows_x{};  // sums, and those with the number of the place
      for (int64_t k = 0; k < size; ++k)
        for (int64_t c = 0; c < n; c += many) {
          const T *from = image + places.at[k] * n + c, *by = d + offset + k * C + c;
          V left, right, left_down, right_down;  // of the row that is read, and differences down
          if (all) {
            const auto upper = Pixel::load_pair(from), down = Pixel::load_pair(from + below) - upper, both = upper + places.lower[k] * down;
            left = Pixel::left(both), right = Pixel::right(both), left_down = Pixel::left(down), right_down = Pixel::right(down);
          } else {
            const V a = Pixel::load(from), b = Pixel::load(from + n);
            left_down = Pixel::load(from + below) - a, right_down = Pixel::load(from + below + n) - b;
            left = a + places.lower[k] * left_down, right = b + places.lower[k] * right_down;
          }
          V v = Pixel::load(by);
          if (c + many == n) v = (V)((typename Pixel::Mask)v & given);
          const V column = v * (right - left), row = v * (left_down + places.right[k] * (right_down - left_down));
          columns += column, rows += row;
          columns_x += T(k) * column, rows_x += T(k) * row;
        }
      const double across = j - 0.5 * (x.W - 1), up = 0.5 * (x.H - 1) - i, all_columns = total(columns), all_rows = total(rows);
      d_frame[0] += all_columns * across + total(columns_x);
      d_frame[1] += all_columns * up;
      d_frame[2] -= all_rows * across + total(rows_x);
      d_frame[3] -= all_rows * up;
    });
  });
}
