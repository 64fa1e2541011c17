// transformer and its gradient on the CPU: a tile of sequences goes through all layers while it is in the caches.
#include "../kernels.h"
#include "rows.h"
#include "transformer.h"
#define PSF_KERNEL "transformer.kernel.h"
#include "each_isa.h"

#include <numeric>

namespace psf {

LinearPart TransformerParts::linear(int64_t in, int64_t out) {
  LinearPart part{in, out, take(in * out), 0, pack(in, out), pack(out, in)};
  part.bias = take(out);
  return part;
}
NormPart TransformerParts::norm_of(int64_t width) {
  const int64_t gain = take(width);
  return {gain, take(width)};
}
TransformerParts::TransformerParts(const TransformerSizes& sizes) {
  const int64_t W = sizes.width;
  if (sizes.in) {
    embed = linear(sizes.in, W);
    positions = take(sizes.tokens * W);
  }
  for (int64_t k = 0; k < sizes.layers; ++k) {
    BlockPart part;
    part.before_attention = norm_of(W);
    const int64_t weight = take(3 * W * W), bias = take(3 * W);
    part.query = {W, W, weight, bias, pack(W, W), pack(W, W)};
    part.key_value = {W, 2 * W, weight + W * W, bias + W, pack(W, 2 * W), pack(2 * W, W)};
    part.out = linear(W, W);
    part.before_feedforward = norm_of(W);
    part.up = linear(W, sizes.feedforward);
    part.down = linear(sizes.feedforward, W);
    blocks.push_back(part);
  }
  if (sizes.out) {
    norm = norm_of(W);
    hidden = linear(W, W);
    head = linear(W, sizes.out);
  }
}

namespace {

using Maybe = std::optional<Tensor>;

constexpr int64_t padding = 16;  // kept states are for sequences in multiples of it: for tiles of any instruction set
constexpr int64_t groups = 16;   // of tiles, each with weight gradients of its own, for any number of threads

// The checked arguments of a call.
struct Call {
  Arguments in;
  Dim M{"M"}, N{"L", 1, 256}, E{"E", 1, 4096};
  std::vector<int64_t> read, order, length;
  TransformerSizes sizes{};
  std::optional<TransformerParts> parts;

  Call(const char* op, const Tensor& x, const Tensor& weights, const Maybe& lengths, const Integers& given, const Integers& read_in, bool gelu, double eps)
      : in(op), read(read_in) {
    in.floats("x", x, {&M, &N, &E});
    PSF_CHECK_VALUE(given.size() == 6, op, ": sizes must be in_features, width, layers, heads, feedforward and out_features, got ", given.size(), " values");
    const char* names[] = {"in_features", "width", "layers", "heads", "feedforward", "out_features"};
    for (int k = 0; k < 6; ++k) in.count(names[k], given[k], k == 0 || k == 5 ? 0 : 1, 4096);
    PSF_CHECK_VALUE(given[1] % given[3] == 0, op, ": width must be a multiple of heads = ", given[3], ", got ", given[1]);
    in.count("tokens of read", static_cast<int64_t>(read.size()), 0, N);
    for (const int64_t token : read) in.count("each of read", token, 0, N - 1);
    PSF_CHECK_VALUE(eps >= 0 && eps < std::numeric_limits<double>::infinity(), op, ": eps must be finite and >= 0, got ", eps);
    sizes = {given[0], given[1], given[2], given[3], given[4], given[5], N, read.empty() ? nullptr : read.data(),
             read.empty() ? int64_t(N) : static_cast<int64_t>(read.size()), gelu, eps};
    PSF_CHECK_VALUE(E == sizes.input(), op, ": x must have ", sizes.input(), " features, got ", int64_t(E));
    parts.emplace(sizes);
    Dim P{"weights", parts->weights, parts->weights};
    in.floats("weights", weights, {&P});
    PSF_CHECK_VALUE(!lengths || read.empty(), op, ": read must be empty where lengths are given, got ", read.size(), " tokens");
    if (!lengths) return;
    const Tensor held = in.integers("lengths", *lengths, {&M}).contiguous();
    const int64_t* values = held.const_data_ptr<int64_t>();
    length.assign(values, values + M);
    for (const int64_t tokens : length) in.count("each of lengths", tokens, 1, N);
    order.resize(M);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
  }
  int64_t values_kept() const { return (sizes.layers * sizes.tokens + sizes.outputs) * sizes.width; }
  template <class T> int64_t tiles() const { return (M + lane_count<T>() - 1) / lane_count<T>(); }
  template <class T> Sequences<T> tile(int64_t number) const {
    Sequences<T> some;
    const int64_t first = number * lane_count<T>();
    some.count = static_cast<int>(std::min<int64_t>(lane_count<T>(), M - first));
    some.ragged = !order.empty();
    for (int l = 0; l < some.count; ++l) {
      some.number[l] = some.ragged ? order[first + l] : first + l;
      some.length[l] = some.ragged ? length[some.number[l]] : sizes.tokens;
      some.tokens = std::max(some.tokens, some.length[l]);
    }
    return some;
  }
  template <class T> TransformerCall<T> packed(const Tensor& weights, const Tensor& memory, bool back) const {
    const TransformerCall<T> call{sizes, &*parts, parts->blocks.data(), weights.const_data_ptr<T>(), memory.mutable_data_ptr<T>()};
    PSF_DISPATCH(pack_transformer<T>(call, back));
    return call;
  }
  template <class T> int64_t scratch(bool back) const {
    int64_t count = 0;
    PSF_DISPATCH(transformer_scratch<T>(sizes, back, count));
    return count;
  }
};

std::tuple<Tensor, Tensor> transformer(const Tensor& x_in, const Tensor& weights_in, const Maybe& lengths, const Integers& sizes,
                                       const Integers& read, bool gelu, double eps, bool keep) {
  const Call given("transformer", x_in, weights_in, lengths, sizes, read, gelu, eps);
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous();
  const int64_t shape[] = {given.M, given.sizes.outputs, given.sizes.output()};
  const Tensor y = lengths ? zeros({shape, 3}, x.options()) : empty({shape, 3}, x.options());
  const int64_t room = (given.M + padding - 1) / padding * padding;
  const Tensor kept = empty({keep ? room : 0, given.values_kept()}, x.options()), memory = empty({given.parts->packed}, x.options());
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const TransformerCall<T> call = given.packed<T>(weights, memory, false);
    const T* from = x.const_data_ptr<T>();
    T *to = y.mutable_data_ptr<T>(), *states = keep ? kept.mutable_data_ptr<T>() : nullptr;
    for_each_group<T>(given.tiles<T>(), given.scratch<T>(false), [&](int64_t number, T* scratch) {
      const Sequences<T> some = given.tile<T>(number);
      T* const own = states ? states + number * lane_count<T>() * given.values_kept() : nullptr;
      PSF_DISPATCH(transformer_tile<T>(call, some, from, to, own, scratch));
    });
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor> transformer_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& weights_in, const Tensor& kept_in, const Maybe& lengths,
                                                const Integers& sizes, const Integers& read, bool gelu, double eps, bool needs_x, bool needs_weights) {
  Call given("transformer_backward", x_in, weights_in, lengths, sizes, read, gelu, eps);
  Dim outputs{"R", given.sizes.outputs, given.sizes.outputs}, features{"out", given.sizes.output(), given.sizes.output()}, values{"kept", given.values_kept(), given.values_kept()};
  const int64_t room = (given.M + padding - 1) / padding * padding;
  Dim rows{"rows of kept"};
  const Tensor d_y = given.in.floats("d_y", d_y_in, {&given.M, &outputs, &features}).contiguous(), kept = given.in.floats("kept", kept_in, {&rows, &values}).contiguous();
  PSF_CHECK_VALUE(rows == 0 || rows == room, "transformer_backward: kept must have 0 or ", room, " rows, got ", int64_t(rows));
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous();
  const Tensor d_x = !needs_x ? Tensor() : lengths ? zeros_like(x) : empty_like(x);
  const Tensor memory = empty({given.parts->packed}, x.options());
  Tensor parts;
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const TransformerCall<T> call = given.packed<T>(weights, memory, true);
    const T *dy = d_y.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *states = rows ? kept.const_data_ptr<T>() : nullptr;
    const int64_t tiles = given.tiles<T>(), parts_count = std::clamp<int64_t>(tiles, 1, groups), P = given.parts->weights;
    if (needs_weights) parts = zeros({parts_count, P}, x.options());
    T *dx = needs_x ? d_x.mutable_data_ptr<T>() : nullptr, *d = needs_weights ? parts.mutable_data_ptr<T>() : nullptr;
    for_each_group<T>(parts_count, given.scratch<T>(true), [&](int64_t group, T* scratch) {
      for (int64_t number = group * tiles / parts_count; number < (group + 1) * tiles / parts_count; ++number) {
        const Sequences<T> some = given.tile<T>(number);
        const T* const own = states ? states + number * lane_count<T>() * given.values_kept() : nullptr;
        PSF_DISPATCH(transformer_tile_gradient<T>(call, some, dy, from, own, dx, d ? d + group * P : nullptr, scratch));
      }
    });
  });
  return {d_x, needs_weights ? sum(parts, {0}) : Tensor()};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&transformer>("transformer");
  m.add<&transformer_backward>("transformer_backward");
}

}  // namespace psf
