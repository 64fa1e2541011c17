// transformer and its gradient on the CPU: a tile of sequences goes through all layers while it is in the caches.
#include "../kernels.h"
#include "transformer.h"
#define PSF_KERNEL "transformer.kernel.h"
#include "each_isa.h"

namespace psf {

namespace {

using Maybe = std::optional<Tensor>;

// The checked arguments of a call.
struct Call {
  Arguments in;
  Dim M{"M"}, N{"L", 1, 256}, E{"E", 1, 4096};
  Integers read;
  TransformerSizes sizes{};
  std::optional<TransformerParts> parts;
  std::optional<Tiles> tiles;

  Call(const char* op, const Tensor& x, const Tensor& weights, const Maybe& lengths, const Integers& given, const Integers& read_in, bool gelu, double eps)
      : in(op), read(read_in) {
    in.floats("x", x, {&M, &N, &E});
    PSF_CHECK_VALUE(given.size() == 6, op, ": sizes must be in_features, width, layers, heads, feedforward and out_features, got ", given.size(), " values");
    const char* names[] = {"in_features", "width", "layers", "heads", "feedforward", "out_features"};
    for (int k = 0; k < 6; ++k) in.count(names[k], given[k], k == 0 || k == 5 ? 0 : 1, k == 2 ? 1024 : 4096);
    PSF_CHECK_VALUE(given[1] % given[3] == 0, op, ": width must be a multiple of heads = ", given[3], ", got ", given[1]);
    in.count("the number of tokens of read", static_cast<int64_t>(read.size()), 0, 256);
    for (const int64_t token : read) in.count("each of read", token, 0, N - 1);
    PSF_CHECK_VALUE(eps >= 0 && eps < std::numeric_limits<double>::infinity(), op, ": eps must be finite and >= 0, got ", eps);
    sizes = {given[0], given[1], given[2], given[3], given[4], given[5], N, read.empty() ? nullptr : read.data(),
             read.empty() ? int64_t(N) : static_cast<int64_t>(read.size()), gelu, eps};
    PSF_CHECK_VALUE(E == sizes.input(), op, ": x must have ", sizes.input(), " features, got ", int64_t(E));
    parts.emplace(sizes);
    Dim P{"weights", parts->weights, parts->weights};
    in.floats("weights", weights, {&P});
    PSF_CHECK_VALUE(!lengths || read.empty(), op, ": read must be empty where lengths are given, got ", read.size(), " tokens");
    if (!lengths) {
      tiles.emplace(M, N);
      return;
    }
    const Tensor held = in.integers("lengths", *lengths, {&M}).contiguous();
    const int64_t* length = held.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < M; ++k) in.count("each of lengths", length[k], 1, N);
    tiles.emplace(M, N, length);
  }
  int64_t values_kept() const { return (sizes.layers * sizes.tokens + sizes.outputs) * sizes.width; }
  template <class T> TransformerCall<T> packed(const Tensor& weights, const Tensor& memory, bool back, bool bf16) const {
    const TransformerCall<T> call{sizes, &*parts, parts->blocks.data(), {weights.const_data_ptr<T>(), memory.mutable_data_ptr<T>(), takes_bf16<T>(bf16)}};
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
                                       const Integers& read, bool gelu, double eps, bool keep, bool allow_bf16) {
  const Call given("transformer", x_in, weights_in, lengths, sizes, read, gelu, eps);
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous();
  const int64_t shape[] = {given.M, given.sizes.outputs, given.sizes.output()};
  const Tensor y = lengths ? zeros({shape, 3}, x.options()) : empty({shape, 3}, x.options());  // zeros after the end of a sequence
  const int64_t states_shape[] = {keep ? kept_rows(given.M) : 0, given.values_kept()};
  const Tensor kept = lengths ? zeros({states_shape, 2}, x.options()) : empty({states_shape, 2}, x.options()), memory = empty({given.parts->packed}, x.options());
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const TransformerCall<T> call = given.packed<T>(weights, memory, false, allow_bf16);
    const T* from = x.const_data_ptr<T>();
    T *to = y.mutable_data_ptr<T>(), *states = keep ? kept.mutable_data_ptr<T>() : nullptr;
    mark_lanes<T>(kept, given.M);
    for_each_sequence_tile<T>(*given.tiles, given.scratch<T>(false), [&](const Sequences<T>& some, int64_t number, T* scratch) {
      T* const own = states ? states + number * lane_count<T>() * given.values_kept() : nullptr;
      PSF_DISPATCH(transformer_tile<T>(call, some, from, to, own, scratch));
    });
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor> transformer_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& weights_in, const Tensor& kept_in, const Maybe& lengths,
                                                const Integers& sizes, const Integers& read, bool gelu, double eps, bool needs_x, bool needs_weights, bool allow_bf16) {
  Call given("transformer_backward", x_in, weights_in, lengths, sizes, read, gelu, eps);
  const int64_t features = given.sizes.output(), values = given.values_kept(), all = kept_rows(given.M);
  Dim outputs{"R", given.sizes.outputs, given.sizes.outputs}, out{"out", features, features}, each{"values", values, values}, rows{"rows of kept"};
  const Tensor d_y = given.in.floats("d_y", d_y_in, {&given.M, &outputs, &out}).contiguous(), kept = given.in.floats("kept", kept_in, {&rows, &each}).contiguous();
  PSF_CHECK_VALUE(rows == 0 || rows == all, "transformer_backward: kept must have 0 or ", all, " rows, got ", int64_t(rows));
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous(), memory = empty({given.parts->packed}, x.options());
  const Tensor d_x = !needs_x ? Tensor() : lengths ? zeros_like(x) : empty_like(x);
  Tensor d_weights;
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const TransformerCall<T> call = given.packed<T>(weights, memory, true, allow_bf16);
    const T *dy = d_y.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *states = rows ? kept.const_data_ptr<T>() : nullptr;
    check_lanes<T>(given.in.op, kept);
    T* const dx = needs_x ? d_x.mutable_data_ptr<T>() : nullptr;
    const auto tile = [&](const Sequences<T>& some, int64_t number, T* d, T* scratch) {
      const T* const own = states ? states + number * lane_count<T>() * values : nullptr;
      PSF_DISPATCH(transformer_tile_gradient<T>(call, some, dy, from, own, dx, d, scratch));
    };
    d_weights = sum_of_gradients<T>(*given.tiles, given.parts->weights, needs_weights, x.options(), given.scratch<T>(true), tile);
  });
  return {d_x, d_weights};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&transformer>("transformer");
  m.add<&transformer_backward>("transformer_backward");
}

}  // namespace psf
