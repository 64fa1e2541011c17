// message_passing and its gradient on the CPU: a tile of complete graphs goes through all layers while it is in the caches.
#include "../kernels.h"
#include "message_passing.h"
#define PSF_KERNEL "message_passing.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

// The checked arguments of a call.
struct Call {
  Arguments in;
  Dim M{"M"}, n{"n", 1, 4096}, E{"E", 1, 4096}, B{"graphs of edges"}, C{"C", 0, 4096};
  MessageSizes sizes{};
  std::optional<MessageParts> parts;

  Call(const char* op, const Tensor& x, const Tensor& edges, const Tensor& weights, int64_t width, int64_t layers, int64_t out) : in(op) {
    in.floats("x", x, {&M, &n, &E});
    in.floats("edges", edges, {&B, &n, &n, &C});
    PSF_CHECK_VALUE(B == 0 ? M == 0 : M % B == 0, op, ": edges must be of as many graphs as x has, or share them evenly, got ", int64_t(B), " and ", int64_t(M));
    in.count("width", width, 1, 4096);
    in.count("layers", layers, 1, 1024);
    in.count("out_features", out, 1, 4096);
    sizes = {E, C, width, layers, out, n};
    parts.emplace(sizes);
    Dim P{"weights", parts->weights, parts->weights};
    in.floats("weights", weights, {&P});
  }
  int64_t share() const { return B ? M / B : 1; }
  int64_t values_kept() const { return (sizes.layers + 1) * sizes.state(); }
  template <class T> MessageCall<T> packed(const Tensor& weights, const Tensor& memory, bool back, bool bf16) const {
    const MessageCall<T> call{sizes, &*parts, parts->layers.data(), {weights.const_data_ptr<T>(), memory.mutable_data_ptr<T>(), takes_bf16<T>(bf16)}, share()};
    PSF_DISPATCH(pack_message_passing<T>(call, back));
    return call;
  }
  template <class T> int64_t scratch(bool back, bool needs_edges) const {
    int64_t count = 0;
    PSF_DISPATCH(message_scratch<T>(sizes, back, needs_edges, count));
    return count;
  }
};

std::tuple<Tensor, Tensor> message_passing(const Tensor& x_in, const Tensor& edges_in, const Tensor& weights_in, int64_t width, int64_t layers, int64_t out, bool keep,
                                           bool allow_bf16) {
  const Call given("message_passing", x_in, edges_in, weights_in, width, layers, out);
  const Tensor x = x_in.contiguous(), edges = edges_in.contiguous(), weights = weights_in.contiguous();
  const Tensor y = empty({given.M, given.n, out}, x.options()), memory = empty({given.parts->packed}, x.options());
  const Tensor kept = empty({keep ? kept_rows(given.M) : 0, given.values_kept()}, x.options());
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const MessageCall<T> call = given.packed<T>(weights, memory, false, allow_bf16);
    const T *from = x.const_data_ptr<T>(), *pairs = edges.const_data_ptr<T>();
    T *to = y.mutable_data_ptr<T>(), *states = keep ? kept.mutable_data_ptr<T>() : nullptr;
    mark_lanes<T>(kept, given.M);
    for_each_sequence_tile<T>(Tiles(given.M, given.n), given.scratch<T>(false, false), [&](const Sequences<T>& some, int64_t number, T* scratch) {
      T* const own = states ? states + number * lane_count<T>() * given.values_kept() : nullptr;
      PSF_DISPATCH(message_tile<T>(call, some, from, pairs, to, own, scratch));
    });
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor> message_passing_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& edges_in, const Tensor& weights_in,
    const Tensor& kept_in, int64_t width, int64_t layers, int64_t out, bool needs_x, bool needs_edges, bool needs_weights, bool allow_bf16) {
  Call given("message_passing_backward", x_in, edges_in, weights_in, width, layers, out);
  const int64_t values = given.values_kept(), all = kept_rows(given.M);
  Dim features{"out", out, out}, each{"values", values, values}, rows{"rows of kept"};
  const Tensor d_y = given.in.floats("d_y", d_y_in, {&given.M, &given.n, &features}).contiguous(), kept = given.in.floats("kept", kept_in, {&rows, &each}).contiguous();
  PSF_CHECK_VALUE(rows == 0 || rows == all, "message_passing_backward: kept must have 0 or ", all, " rows, got ", int64_t(rows));
  const Tensor x = x_in.contiguous(), edges = edges_in.contiguous(), weights = weights_in.contiguous(), memory = empty({given.parts->packed}, x.options());
  const Tensor d_x = needs_x ? empty_like(x) : Tensor();
  const Tensor d_each = needs_edges ? empty({given.M, given.n, given.n, given.C}, x.options()) : Tensor();
  Tensor d_weights;
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const MessageCall<T> call = given.packed<T>(weights, memory, true, allow_bf16);
    const T *dy = d_y.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *pairs = edges.const_data_ptr<T>(), *states = rows ? kept.const_data_ptr<T>() : nullptr;
    check_lanes<T>(given.in.op, kept);
    T *dx = needs_x ? d_x.mutable_data_ptr<T>() : nullptr, *de = needs_edges && given.C ? d_each.mutable_data_ptr<T>() : nullptr;
    const auto tile = [&](const Sequences<T>& some, int64_t number, T* d, T* scratch) {
      const T* const own = states ? states + number * lane_count<T>() * values : nullptr;
      PSF_DISPATCH(message_tile_gradient<T>(call, some, dy, from, pairs, own, dx, de, d, scratch));
    };
    d_weights = sum_of_gradients<T>(Tiles(given.M, given.n), given.parts->weights, needs_weights, x.options(), given.scratch<T>(true, de != nullptr), tile);
  });
  const int64_t grouped[] = {given.B, given.share()};
  return {d_x, needs_edges && given.M != given.B ? sum(d_each.unflatten(0, {grouped, 2}), {1}) : d_each, d_weights};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&message_passing>("message_passing");
  m.add<&message_passing_backward>("message_passing_backward");
}

}  // namespace psf
