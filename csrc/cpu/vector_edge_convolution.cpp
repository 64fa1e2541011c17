// vector_edge_convolution and its gradient on the CPU: a tile of clouds goes through all pairs while it is in the caches. The
// statistics of a batch need a pass of their own, and so do their gradients.
#include "../kernels.h"
#include "vector_edge_convolution.h"
#include "network.h"
#define PSF_KERNEL "vector_edge_convolution.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

constexpr double variance_eps = 1e-5;

// The checked arguments of a call.
struct Call {
  Arguments in;
  Dim C{"C", 1, 4096}, d{"d", 1, 4096}, n{"n", 1, 256}, M{"M"}, w{"w", 1, 4096}, joined{"2 C"};
  EdgeSizes sizes{};
  Tensor x, feature, direction, pool, gain, bias, num_nodes;

  Call(const char* op, const Tensor& x_in, const Tensor& feature_in, const Tensor& direction_in, const Tensor& pool_in, const Tensor& gain_in, const Tensor& bias_in, const std::optional<Tensor>& num_nodes_in, int64_t neighbors) : in(op) {
    x = in.floats("x", x_in, {&C, &d, &n, &M}).contiguous();
    joined.size = 2 * C;
    feature = in.floats("feature", feature_in, {&w, &joined}).contiguous();
    direction = in.floats("direction", direction_in, {&w, &joined}).contiguous();
    pool = in.floats("pool", pool_in, {&w, &w}).contiguous();
    gain = in.floats("gain", gain_in, {&w}).contiguous();
    bias = in.floats("bias", bias_in, {&w}).contiguous();
    in.count("neighbors", neighbors, 1, std::numeric_limits<int64_t>::max());
    num_nodes = in.integers("num_nodes", num_nodes_in, {&M});
    for (int64_t k = 0; counts() && k < M; ++k) in.count("each of num_nodes", counts()[k], 0, n);
    sizes = {C, w, d, n, M, std::min<int64_t>(neighbors, n)};
  }
  const int64_t* counts() const { return num_nodes.defined() ? num_nodes.const_data_ptr<int64_t>() : nullptr; }
  // Of what the tiles write: nodes that no tile has are 0.
  Tensor values(IntArrayRef shape, TensorOptions options) const { return num_nodes.defined() ? zeros(shape, options) : empty(shape, options); }
  Tensor vector(const char* name, const Tensor& given) { return in.floats(name, given, {&w}).contiguous(); }
  template <class T> int64_t tiles() const { return (M + lane_count<T>() - 1) / lane_count<T>(); }
  template <class T> int64_t scratch() const {
    int64_t values = 0;
    PSF_DISPATCH(edge_scratch<T>(sizes, values));
    return values;
  }
};

// What the tiles of a call read.
template <class T> struct Prepared {
  const Call& given;
  EdgeCall<T> call{};
  std::vector<T> scale, shift, inverse;  // inverse: of the standard deviation
  Tensor maps, packed;

  Prepared(const Call& given, bool back) : given(given) {
    const EdgeSizes& s = given.sizes;
    maps = empty({s.maps(), s.in}, given.x.options());
    T* row = maps.mutable_data_ptr<T>();
    for (const Tensor* from : {&given.feature, &given.direction}) {
      const T* weights = from->const_data_ptr<T>();  // W [x_j - x_i, x_i] = A x_j + (C - A) x_i
      for (int64_t part = 0; part < 2; ++part)
        for (int64_t o = 0; o < s.width; ++o)
          for (int64_t i = 0; i < s.in; ++i) {
            const T neighbor = weights[o * 2 * s.in + i], center = weights[(o * 2 + 1) * s.in + i];
            *row++ = part ? center - neighbor : neighbor;
          }
    }
    const int64_t forward = (s.maps() + 3) * s.in, turned = (s.in + 3) * s.maps(), pool = (s.width + 3) * s.width;
    packed = empty({forward + 2 * turned + pool}, given.x.options());
    T* const memory = packed.mutable_data_ptr<T>();
    call = {s, maps.const_data_ptr<T>(), given.pool.const_data_ptr<T>(), given.x.const_data_ptr<T>(), memory, memory + forward, memory + forward + turned, memory + forward + 2 * turned, nullptr, nullptr, given.counts()};
    PSF_DISPATCH(pack_edge_convolution<T>(call, back));
  }
  void normalise(const Tensor& mean, const Tensor& variance) {
    const T *m = mean.const_data_ptr<T>(), *v = variance.const_data_ptr<T>(), *g = given.gain.const_data_ptr<T>(), *b = given.bias.const_data_ptr<T>();
    for (int64_t c = 0; c < given.w; ++c) {
      inverse.push_back(T(1) / std::sqrt(v[c] + T(variance_eps)));
      scale.push_back(g[c] * inverse[c]);
      shift.push_back(b[c] - scale[c] * m[c]);
    }
    call.scale = scale.data(), call.shift = shift.data();
  }
  // f(first cloud, clouds, number of the tile, scratch)
  template <class F> void for_each_edge_tile(F f) const {
    for_each_group<T>(given.tiles<T>(), given.scratch<T>(), [&](int64_t tile, T* scratch) { at(tile, scratch, f); });
  }
  template <class F> void at(int64_t tile, T* scratch, F f) const {
    if (call.num_nodes) tile = tile % 2 ? given.tiles<T>() - 1 - tile / 2 : tile / 2;  // of sorted clouds: as much work for every thread
    const int64_t first = tile * lane_count<T>();
    f(first, std::min<int64_t>(lane_count<T>(), given.M - first), tile, scratch);
  }
};

// Mean, variance and number of near pairs of the batch, from tile to tile in their order.
template <class T> void batch_statistics(const Prepared<T>& some, const Tensor& mean, const Tensor& variance, const Tensor& count) {
  const int64_t W = some.given.w, each = 1 + 2 * W, tiles = some.given.template tiles<T>();
  std::vector<double> parts(tiles * each);
  some.for_each_edge_tile([&](int64_t first, int64_t clouds, int64_t tile, T* scratch) {
    PSF_DISPATCH(edge_moments<T>(some.call, first, clouds, parts.data() + tile * each, scratch));
  });
  double all = 0;
  for (int64_t t = 0; t < tiles; ++t) all += parts[t * each];
  for (int64_t c = 0; c < W; ++c) {
    double center = 0, squares = 0;
    for (int64_t t = 0; t < tiles; ++t) center += parts[t * each] * parts[t * each + 1 + 2 * c];
    center /= all;
    for (int64_t t = 0; t < tiles; ++t) {
      const double apart = parts[t * each + 1 + 2 * c] - center;
      squares += parts[t * each + 2 + 2 * c] + parts[t * each] * apart * apart;
    }
    mean.mutable_data_ptr<T>()[c] = static_cast<T>(center);
    variance.mutable_data_ptr<T>()[c] = static_cast<T>(squares / all);
  }
  *count.mutable_data_ptr<int64_t>() = static_cast<int64_t>(all);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vector_edge_convolution(const Tensor& x, const Tensor& feature, const Tensor& direction, const Tensor& pool,
    const Tensor& gain, const Tensor& bias, const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, const std::optional<Tensor>& num_nodes, int64_t neighbors) {
  Call given("vector_edge_convolution", x, feature, direction, pool, gain, bias, num_nodes, neighbors);
  const Tensor seen_mean = given.in.floats("running_mean", running_mean, {&given.w}), seen_variance = given.in.floats("running_var", running_var, {&given.w});
  PSF_CHECK_VALUE(seen_mean.defined() == seen_variance.defined(), "vector_edge_convolution: running_mean must be given with running_var, got one of them");
  PSF_CHECK_VALUE(given.M > 0 || seen_mean.defined(), "vector_edge_convolution: x must be of at least one cloud without running statistics, got M = 0");
  const TensorOptions options = given.x.options();
  const Tensor y = given.values({given.w, given.d, given.n, given.M}, options), taken = given.values({given.w, given.n, given.M}, options.dtype(kByte));
  const Tensor mean = empty({given.w}, options), variance = empty({given.w}, options), count = zeros({}, options.dtype(kLong));
  PSF_DISPATCH_FLOATING(given.x.scalar_type(), [&] {
    using T = scalar_t;
    Prepared<T> some(given, false);
    if (seen_mean.defined()) {
      std::memcpy(mean.mutable_data_ptr<T>(), seen_mean.const_data_ptr<T>(), given.w * sizeof(T));
      std::memcpy(variance.mutable_data_ptr<T>(), seen_variance.const_data_ptr<T>(), given.w * sizeof(T));
    } else {
      batch_statistics<T>(some, mean, variance, count);
    }
    some.normalise(mean, variance);
    T* const to = y.mutable_data_ptr<T>();
    uint8_t* const pooled = taken.mutable_data_ptr<uint8_t>();
    some.for_each_edge_tile([&](int64_t first, int64_t clouds, int64_t, T* scratch) { PSF_DISPATCH(edge_convolve<T>(some.call, first, clouds, to, pooled, scratch)); });
  });
  return {y, taken, mean, variance, count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vector_edge_convolution_backward(const Tensor& d_y_in, const Tensor& x, const Tensor& feature, const Tensor& direction,
    const Tensor& pool, const Tensor& gain, const Tensor& bias, const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var, const std::optional<Tensor>& num_nodes, const Tensor& taken_in,
    const Tensor& mean_in, const Tensor& variance_in, const Tensor& count_in, int64_t neighbors, bool needs_x) {
  Call given("vector_edge_convolution_backward", x, feature, direction, pool, gain, bias, num_nodes, neighbors);
  const EdgeSizes& s = given.sizes;
  const Tensor d_y = given.in.floats("d_y", d_y_in, {&given.w, &given.d, &given.n, &given.M}).contiguous();
  const Tensor taken = given.in.integers("taken", taken_in, {&given.w, &given.n, &given.M}, kByte).contiguous(), count = given.in.integers("count", count_in, {});
  const Tensor mean = given.vector("mean", mean_in), variance = given.vector("variance", variance_in);
  const bool learned = !running_mean && !running_var;  // the statistics are those of the batch
  const Tensor d_x = needs_x ? given.values({given.C, given.d, given.n, given.M}, given.x.options()) : Tensor(), d_feature = empty_like(given.feature), d_direction = empty_like(given.direction);
  const Tensor d_gain = empty_like(given.gain), d_bias = empty_like(given.bias);
  PSF_DISPATCH_FLOATING(given.x.scalar_type(), [&] {
    using T = scalar_t;
    Prepared<T> some(given, true);
    some.normalise(mean, variance);
    const T *dy = d_y.const_data_ptr<T>(), *m = mean.const_data_ptr<T>(), *g = given.gain.const_data_ptr<T>();
    const uint8_t* pooled = taken.const_data_ptr<uint8_t>();
    T* dx = needs_x ? d_x.mutable_data_ptr<T>() : nullptr;
    const int64_t values = edge_gradients(s);
    const auto sum_over_tiles = [&](auto f) {
      return sum_of_gradients<T>(Tiles(given.M, given.n), values, true, given.x.options(), given.scratch<T>(), [&](const Sequences<T>&, int64_t number, T* d, T* scratch) {
        some.at(number, scratch, [&](int64_t first, int64_t clouds, int64_t, T* memory) { f(first, clouds, d, memory); });
      });
    };
    const Tensor sums = sum_over_tiles([&](int64_t first, int64_t clouds, T* d, T* scratch) {
      PSF_DISPATCH(edge_convolve_gradient<T>(some.call, first, clouds, dy, pooled, d, dx, scratch));
    });
    const T *d_maps = sums.const_data_ptr<T>(), *d_scale = d_maps + s.maps() * s.in, *d_shift = d_scale + s.width;
    std::vector<T> offset, slope;
    for (int64_t c = 0; c < s.width; ++c) {
      const T by_scale = d_scale[c] - m[c] * d_shift[c], inverse = some.inverse[c];
      d_gain.mutable_data_ptr<T>()[c] = by_scale * inverse;
      d_bias.mutable_data_ptr<T>()[c] = d_shift[c];
      const T pairs = T(*count.const_data_ptr<int64_t>()), by_variance = T(-0.5) * by_scale * g[c] * inverse * inverse * inverse;
      slope.push_back(T(2) * by_variance / pairs);
      offset.push_back(-some.scale[c] * d_shift[c] / pairs - slope[c] * m[c]);
    }
    Tensor further;
    if (learned)
      further = sum_over_tiles([&](int64_t first, int64_t clouds, T* d, T* scratch) {
        PSF_DISPATCH(edge_moments_gradient<T>(some.call, first, clouds, offset.data(), slope.data(), d, dx, scratch));
      });
    const T* more = learned ? further.const_data_ptr<T>() : nullptr;
    const int64_t part = s.width * s.in;  // d_maps: of neighbours and centers, for the feature and the direction
    for (const Tensor* to : {&d_feature, &d_direction}) {
      T* d = to->mutable_data_ptr<T>();
      for (int64_t o = 0; o < s.width; ++o)
        for (int64_t i = 0; i < s.in; ++i) {
          const int64_t at = o * s.in + i;
          const T neighbor = d_maps[at] + (more ? more[at] : T(0)), center = d_maps[part + at] + (more ? more[part + at] : T(0));
          d[o * 2 * s.in + i] = neighbor - center;
          d[(o * 2 + 1) * s.in + i] = center;
        }
      d_maps += 2 * part;
      more = nullptr;  // norms do not depend on the direction
    }
  });
  return {d_x, d_feature, d_direction, d_gain, d_bias};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&vector_edge_convolution>("vector_edge_convolution");
  m.add<&vector_edge_convolution_backward>("vector_edge_convolution_backward");
}

}  // namespace psf
