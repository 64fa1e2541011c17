// An edge convolution of Vector Neurons on a tile of clouds, one a lane. A plane holds rows (node, component) of channels.
#include "planes.h"

template <class T> void pack_edge_convolution(const EdgeCall<T>& call, bool back) {
  const EdgeSizes& s = call.sizes;
  pack(call.maps, s.maps(), s.in, s.in, 1, call.forward);
  if (!back) return pack(call.pool, s.width, s.width, s.width, 1, call.pooling);
  pack(call.maps, s.in, s.maps(), 1, s.in, call.back);
  pack(call.maps, s.in, 2 * s.width, 1, s.in, call.norm_back);
}

// D: the number of components, 0 if it is not known here. A tile has the nodes of its largest cloud. Those that are not valid in
// a lane count as 0 when read, and are near to none.
template <class T, int D> struct EdgeTile {
  static constexpr int64_t L = lanes<T>;
  using V = Vec<T>;
  using I = IntVec<T>;
  const EdgeCall<T>& call;
  const EdgeSizes& s;
  const int64_t first, count, n, W, in, dim, step;  // clouds from `first` on; step: from a row of `maps` to the next
  T *memory, *x, *maps, *near, *distance;
  I nodes{};  // valid ones of every lane

  EdgeTile(const EdgeCall<T>& call, int64_t first, int64_t count, T* scratch)
      : call(call), s(call.sizes), first(first), count(count), n(most(call, first, count)), W(s.width), in(s.in), dim(D ? D : s.dim), step(s.maps() * L), memory(scratch) {
    x = take(rows() * in), maps = take(rows() * s.maps()), near = take(n), distance = take(n);
    for (int l = 0; l < count; ++l) nodes[l] = Int(call.num_nodes ? call.num_nodes[first + l] : n);
    read(call.x, in, x);
  }
  static int64_t most(const EdgeCall<T>& call, int64_t first, int64_t count) {
    return call.num_nodes ? *std::max_element(call.num_nodes + first, call.num_nodes + first + count) : call.sizes.nodes;
  }
  int64_t rows() const { return n * dim; }
  // In vectors: of the tile itself, and of its largest step.
  static int64_t scratch(const EdgeSizes& s) {
    const int64_t tile = s.rows() * (s.in + s.maps()) + 2 * s.nodes;
    const int64_t forward = s.rows() * 3 * s.width, back = s.rows() * (s.maps() + s.in + s.width) + block_rows * (s.in + L) + 2 * s.width;
    return tile + std::max(std::max(forward, back), 3 * s.width);
  }
  T* take(int64_t vectors) {
    T* const now = memory;
    memory += vectors * L;
    return now;
  }
  I is_valid(int64_t i) const { return I{} + Int(i) < nodes; }
  // (channels, d, n, M) <-> a plane; lanes without a cloud, and nodes that are not valid, are 0.
  template <class F> void for_values(int64_t channels, F f) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t a = 0; a < dim; ++a)
        for (int64_t i = 0; i < n; ++i) f(((c * dim + a) * s.nodes + i) * s.clouds + first, ((i * dim + a) * channels + c) * L, is_valid(i));
  }
  void read(const T* from, int64_t channels, T* plane) const {
    for_values(channels, [&](int64_t at, int64_t to, I valid) { store(plane + to, valid ? load_some(from + at, count) : V{}); });
  }
  void write(const T* plane, int64_t channels, T* to) const {
    for_values(channels, [&](int64_t at, int64_t from, I valid) { store_some(to + at, valid ? load(plane + from) : V{}, count); });
  }

  void map(int64_t outputs) const { linear<T>(x, in * L, rows(), call.forward, nullptr, in, outputs, false, maps, step); }
  // Adds the gradients of the first `outputs` maps, with d_maps in the rows of `step`, to d; and to those of the input in d_x, if given.
  void turn(const T* d_maps, int64_t outputs, const T* back, bool add, T* panel, T* d, T* plane, T* d_x) const {
    weight_gradient<T>(d_maps, step, x, in * L, rows(), in, outputs, panel, d, in, nullptr);
    if (!d_x) return;
    if (add) read(d_x, in, plane);
    linear<T>(d_maps, step, rows(), back, nullptr, outputs, in, add, plane, in * L);
    write(plane, in, d_x);
  }

  // near: which nodes are among the nearest to i, all bits set, in clouds that have both.
  void find_nearest(int64_t i) const {
    const int64_t numbers = dim * in * L;
    for (int64_t j = 0; s.neighbors < n && j < n; ++j) {
      V sum[2] = {};
      for (int64_t f = 0; f < numbers; f += L) {
        const V apart = load(x + i * numbers + f) - load(x + j * numbers + f);
        sum[f / L % 2] += apart * apart;
      }
      store(distance + j * L, is_valid(j) ? square_root<T>(sum[0] + sum[1]) : splat<T>(std::numeric_limits<T>::infinity()));
    }
    for (int64_t j = 0; j < n; ++j) {
      I closer{};  // than j
      const V own = load(distance + j * L);
      for (int64_t m = 0; s.neighbors < n && m < n; ++m) closer -= load(distance + m * L) < own;
      const I taken = s.neighbors < n ? (closer < Int(s.neighbors)) & (own == own) : is_valid(j);
      store(near + j * L, taken & is_valid(j) & is_valid(i));
    }
  }
  using Int = typename Lanes<T>::Int;
  I is_near(int64_t j) const { return load_as<I>(near + j * L); }

  // The map `part` of (neighbour, center) for component a of channel c.
  const T* neighbor(int64_t part, int64_t j, int64_t a, int64_t c) const { return maps + (j * dim + a) * step + (2 * part * W + c) * L; }
  const T* center(int64_t part, int64_t i, int64_t a, int64_t c) const { return maps + (i * dim + a) * step + ((2 * part + 1) * W + c) * L; }
  V pair(int64_t part, int64_t i, int64_t j, int64_t a, int64_t c) const { return load(neighbor(part, j, a, c)) + load(center(part, i, a, c)); }
  V norm_of_pair(int64_t i, int64_t j, int64_t c) const {
    V square = splat<T>(T(1e-12));
    for (int64_t a = 0; a < dim; ++a) {
      const V p = pair(0, i, j, a, c);
      square += p * p;
    }
    return square_root<T>(square);
  }

  // Of the norms |p| of near pairs: how many, and for every channel their mean and the sum of their squared distances from it.
  void moments(double* out) {
    T *origin = take(W), *sum = take(W), *square = take(W);  // sums of distances from the first norm of a lane
    map(2 * W);
    std::memset(sum, 0, 2 * W * L * sizeof(T));
    I pairs{};
    for (int64_t i = 0; i < n; ++i) {
      find_nearest(i);
      for (int64_t j = 0; j < n; ++j) {
        const I taken = is_near(j);
        pairs -= taken;
        for (int64_t c = 0; c < W; ++c) {
          const V norm = norm_of_pair(i, j, c);
          if (i == 0 && j == 0) store(origin + c * L, norm);
          const V apart = taken ? norm - load(origin + c * L) : V{};
          store(sum + c * L, load(sum + c * L) + apart);
          store(square + c * L, load(square + c * L) + apart * apart);
        }
      }
    }
    for (int64_t l = 0; l < count; ++l) out[0] += double(pairs[l]);
    for (int64_t c = 0; c < W; ++c) {
      double all = 0, squares = 0;
      for (int64_t l = 0; l < count; ++l)
        if (pairs[l]) all += double(pairs[l]) * double(origin[c * L + l]) + double(sum[c * L + l]);
      const double mean = out[0] ? all / out[0] : 0.0;
      for (int64_t l = 0; l < count; ++l) {
        if (!pairs[l]) continue;
        const double number = double(pairs[l]), own = double(sum[c * L + l]) / number, apart = double(origin[c * L + l]) + own - mean;
        squares += std::max(double(square[c * L + l]) - own * own * number, 0.0) + number * apart * apart;
      }
      out[1 + 2 * c] = mean, out[2 + 2 * c] = squares;
    }
  }

  // y = s p - c q, with s and c from |p|, <p, q> and <q, q>, which may be as large as T holds: divisions, no `reciprocal`.
  struct Factors {
    V inverse, s, pq, qq, c;
    Factors(V pp, V pq, V qq_, T scale, T shift) : pq(pq), qq(qq_ + T(1e-6)) {
      inverse = T(1) / square_root<T>(pp + T(1e-12));
      s = scale + shift * inverse;
      const V along = s * pq;
      c = (along > T(0) ? V{} : along) * T(0.8) / qq;
    }
  };

  // Of every node and channel: the pooled pair, and whose it is.
  void convolve(T* y, uint8_t* taken) {
    T *pairs = take(rows() * W), *along = take(rows() * W), *out = take(rows() * W);
    map(s.maps());
    for (int64_t i = 0; i < n; ++i) {
      find_nearest(i);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < W; ++c) {
          V pp{}, pq{}, qq{};
          for (int64_t a = 0; a < dim; ++a) {
            const V p = pair(0, i, j, a, c), q = pair(1, i, j, a, c);
            pp += p * p, pq += p * q, qq += q * q;
          }
          const Factors f(pp, pq, qq, call.scale[c], call.shift[c]);
          for (int64_t a = 0; a < dim; ++a) store(pairs + ((j * dim + a) * W + c) * L, f.s * pair(0, i, j, a, c) - f.c * pair(1, i, j, a, c));
        }
      linear<T>(pairs, W * L, rows(), call.pooling, nullptr, W, W, false, along, W * L);
      for (int64_t c = 0; c < W; ++c) {
        const V lowest = splat<T>(-std::numeric_limits<T>::infinity());
        V most = lowest;
        I which{}, lost{};  // lost: a height is no number; then the first node is taken
        for (int64_t j = 0; j < n; ++j) {
          V height{};
          for (int64_t a = 0; a < dim; ++a) height += load(pairs + ((j * dim + a) * W + c) * L) * load(along + ((j * dim + a) * W + c) * L);
          height += is_near(j) ? V{} : lowest;
          const I higher = height >= most;
          lost |= height != height;
          most = higher ? height : most;
          which = higher ? I{} + Int(j) : which;
        }
        which = lost ? I{} : which;
        for (int64_t a = 0; a < dim; ++a) {
          V value = load(pairs + (a * W + c) * L);
          for (int64_t j = 1; j < n; ++j) value = which == Int(j) ? load(pairs + ((j * dim + a) * W + c) * L) : value;
          store(out + ((i * dim + a) * W + c) * L, value);
        }
        which = is_valid(i) ? which : I{};
        for (int64_t l = 0; l < count; ++l) taken[(c * s.nodes + i) * s.clouds + first + l] = uint8_t(which[l]);
      }
    }
    write(out, W, y);
  }

  // d += the gradients of maps, scale and shift; d_x, if given: that of the input for given scale and shift.
  void convolve_gradient(const T* d_y, const uint8_t* taken, T* d, T* d_x) {
    T *d_maps = take(rows() * s.maps()), *plane = take(rows() * in), *dy = take(rows() * W), *panel = take(block_rows * (in + L));
    map(s.maps());
    read(d_y, W, dy);
    std::memset(d_maps, 0, rows() * step * sizeof(T));
    T *d_scale = d + s.maps() * in, *d_shift = d_scale + W;
    for (int64_t c = 0; c < W; ++c) {
      V scales{}, shifts{};
      const T scale = call.scale[c], shift = call.shift[c];
      for (int64_t i = 0; i < n; ++i) {
        I which = I{} - Int(1);
        for (int64_t l = 0; l < count; ++l) which[l] = Int(taken[(c * s.nodes + i) * s.clouds + first + l]);
        const auto pooled = [&](int64_t part, int64_t a) {
          V value{};
          for (int64_t j = 0; j < n; ++j) value = which == Int(j) ? load(neighbor(part, j, a, c)) : value;
          return value + load(center(part, i, a, c));
        };
        const auto gradient = [&](int64_t a) { return load(dy + ((i * dim + a) * W + c) * L); };
        V pp{}, pq{}, qq{}, gp{}, gq{};
        for (int64_t a = 0; a < dim; ++a) {
          const V p = pooled(0, a), q = pooled(1, a), g = gradient(a);
          pp += p * p, pq += p * q, qq += q * q, gp += g * p, gq += g * q;
        }
        const Factors f(pp, pq, qq, scale, shift);
        const V e = f.c < T(0) ? -gq / f.qq : V{};  // d_c / <q, q> on the leaky side
        const V ds = gp + T(0.8) * e * f.pq, d_pq = T(0.8) * e * f.s, d_inverse = ds * f.inverse;
        const V radial = -shift * d_inverse * f.inverse * f.inverse, d_qq = T(-2) * e * f.c;
        scales += ds, shifts += d_inverse;
        for (int64_t a = 0; a < dim; ++a) {
          const V p = pooled(0, a), q = pooled(1, a), g = gradient(a);
          add(d_maps, i, a, c, which, g * f.s + q * d_pq + p * radial);
          add(d_maps, i, a, 2 * W + c, which, p * d_pq - g * f.c + q * d_qq);
        }
      }
      d_scale[c] += lane_sum<T>(scales), d_shift[c] += lane_sum<T>(shifts);
    }
    turn(d_maps, s.maps(), call.back, false, panel, d, plane, d_x);
  }
  // To the gradients of a neighbour's map in column `at`, and of the center's W columns on.
  void add(T* d_maps, int64_t i, int64_t a, int64_t at, I which, V d) const {
    store(d_maps + (i * dim + a) * step + (at + W) * L, load(d_maps + (i * dim + a) * step + (at + W) * L) + d);
    for (int64_t j = 0; j < n; ++j) {
      T* const to = d_maps + (j * dim + a) * step + at * L;
      store(to, load(to) + (which == Int(j) ? d : V{}));
    }
  }

  // d and d_x += the gradients through the norms' mean and variance: of a norm, offset + slope times it, for every channel.
  void moments_gradient(const T* offset, const T* slope, T* d, T* d_x) {
    T *d_maps = take(rows() * s.maps()), *plane = take(rows() * in), *panel = take(block_rows * (in + L));
    map(2 * W);
    std::memset(d_maps, 0, rows() * step * sizeof(T));
    for (int64_t i = 0; i < n; ++i) {
      find_nearest(i);
      for (int64_t j = 0; j < n; ++j) {
        const I taken = is_near(j);
        for (int64_t c = 0; c < W; ++c) {
          const V ratio = taken ? offset[c] / norm_of_pair(i, j, c) + slope[c] : V{};
          for (int64_t a = 0; a < dim; ++a) {
            const V dp = ratio * pair(0, i, j, a, c);
            T *to = d_maps + (j * dim + a) * step + c * L, *from = d_maps + (i * dim + a) * step + (W + c) * L;
            store(to, load(to) + dp);
            store(from, load(from) + dp);
          }
        }
      }
    }
    turn(d_maps, 2 * W, call.norm_back, true, panel, d, plane, d_x);
  }
};

template <class T, class F> inline void with_edge_tile(const EdgeCall<T>& call, int64_t first, int64_t count, T* scratch, F f) {
  if (call.sizes.dim == 3) {
    EdgeTile<T, 3> tile(call, first, count, scratch);
    return f(tile);
  }
  EdgeTile<T, 0> tile(call, first, count, scratch);
  f(tile);
}
template <class T> void edge_moments(const EdgeCall<T>& call, int64_t first, int64_t count, double* out, T* scratch) {
  with_edge_tile(call, first, count, scratch, [&](auto& tile) { tile.moments(out); });
}
template <class T> void edge_convolve(const EdgeCall<T>& call, int64_t first, int64_t count, T* y, uint8_t* taken, T* scratch) {
  with_edge_tile(call, first, count, scratch, [&](auto& tile) { tile.convolve(y, taken); });
}
template <class T>
void edge_convolve_gradient(const EdgeCall<T>& call, int64_t first, int64_t count, const T* d_y, const uint8_t* taken, T* d, T* d_x, T* scratch) {
  with_edge_tile(call, first, count, scratch, [&](auto& tile) { tile.convolve_gradient(d_y, taken, d, d_x); });
}
template <class T>
void edge_moments_gradient(const EdgeCall<T>& call, int64_t first, int64_t count, const T* offset, const T* slope, T* d, T* d_x, T* scratch) {
  with_edge_tile(call, first, count, scratch, [&](auto& tile) { tile.moments_gradient(offset, slope, d, d_x); });
}
template <class T> void edge_scratch(const EdgeSizes& sizes, int64_t& values) { values = EdgeTile<T, 0>::scratch(sizes) * lanes<T>; }
