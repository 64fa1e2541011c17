// gin and its gradient on the CPU: some samples of a graph go through all layers while they are in the caches.
#include "../kernels.h"
#include "gin.h"
#define PSF_KERNEL "gin.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

constexpr int64_t tile_rows = 512;  // about as many rows a tile: they fit the second cache

// The checked arguments of a call.
struct Call {
  Arguments in;
  Dim nodes{"nodes"}, S{"S"}, W{"width", 1, 4096};
  GinSizes sizes;
  std::optional<GinParts> parts;
  Tensor edges;
  std::optional<Adjacency> into, out_of;
  std::vector<GinTilePlace> tiles;
  int64_t graphs = 0, most_rows = 0, most_samples = 0;

  Call(const char* op, const Tensor& x, const Tensor& edge_index, const Tensor& ptr_in, const Tensor& weights, int64_t layers, int64_t out,
       int64_t activation, bool final)
      : in(op) {
    in.floats("x", x, {&nodes, &S, &W});
    Dim two{"2", 2, 2, 2}, E{"E"}, offsets{"B + 1", 1};
    edges = in.integers("edge_index", edge_index, {&two, &E}).contiguous();
    const Tensor ptr = in.integers("ptr", ptr_in, {&offsets}).contiguous();
    in.count("layers", layers, 1, 1024);
    in.count("out_features", out, 1, 4096);
    in.count("activation", activation, 0, 3);
    sizes = {W, layers, out, activation, final};
    parts.emplace(sizes);
    Dim P{"weights", parts->weights, parts->weights};
    in.floats("weights", weights, {&P});
    into.emplace(op, edges, nodes, 0);
    out_of.emplace(op, edges, nodes, 1);
    graphs = ptr.size(0) - 1;
    const int64_t* begin = ptr.const_data_ptr<int64_t>();
    graph_of_nodes(op, begin, graphs, nodes, edges);
    for (int64_t b = 0; b < graphs; ++b) {
      const int64_t n = begin[b + 1] - begin[b], each = std::clamp<int64_t>(tile_rows / std::max<int64_t>(n, 1), 1, std::max<int64_t>(S, 1));
      for (int64_t s = 0; s < S; s += each) tiles.push_back({b, begin[b], n, s, std::min<int64_t>(each, S - s)});
      most_rows = std::max(most_rows, n * each);
      most_samples = std::max(most_samples, each);
    }
  }
  template <class T> GinCall<T> packed(const Tensor& weights, const Tensor& memory) const {
    const GinCall<T> call{sizes, nodes, S, weights.const_data_ptr<T>(), memory.mutable_data_ptr<T>(), parts->layers.data(), parts->out, parts->eps, parts->first,
                          into->begin.data(), into->neighbors.data(), out_of->begin.data(), out_of->neighbors.data()};
    PSF_DISPATCH(pack_gin<T>(call));
    return call;
  }
  template <class T> int64_t scratch(bool back, bool states) const {
    int64_t count = 0;
    PSF_DISPATCH(gin_scratch<T>(sizes, most_rows, most_samples, back, states, count));
    return count;
  }
};

std::tuple<Tensor, Tensor> gin(const Tensor& x_in, const Tensor& edge_index, const Tensor& ptr, const Tensor& weights_in, int64_t layers, int64_t out,
                               int64_t activation, bool final, bool keep) {
  const Call given("gin", x_in, edge_index, ptr, weights_in, layers, out, activation, final);
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous(), memory = empty({given.parts->packed}, x.options());
  const Tensor y = empty({given.graphs, given.S, out}, x.options()), kept = empty({keep ? layers : 0, given.nodes, given.S, given.W}, x.options());
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const GinCall<T> call = given.packed<T>(weights, memory);
    const T* from = x.const_data_ptr<T>();
    T *to = y.mutable_data_ptr<T>(), *states = keep ? kept.mutable_data_ptr<T>() : nullptr;
    for_each_group<T>(static_cast<int64_t>(given.tiles.size()), given.scratch<T>(false, keep), [&](int64_t number, T* scratch) {
      PSF_DISPATCH(gin_tile<T>(call, given.tiles[number], from, to, states, scratch));
    });
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor> gin_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& edge_index, const Tensor& ptr, const Tensor& weights_in,
                                        const Tensor& kept_in, int64_t layers, int64_t out, int64_t activation, bool final, bool needs_x, bool needs_weights) {
  Call given("gin_backward", x_in, edge_index, ptr, weights_in, layers, out, activation, final);
  Dim graphs{"B", given.graphs, given.graphs}, features{"out", out, out}, states_kept{"layers or 0"};
  const Tensor d_y = given.in.floats("d_y", d_y_in, {&graphs, &given.S, &features}).contiguous();
  const Tensor kept = given.in.floats("kept", kept_in, {&states_kept, &given.nodes, &given.S, &given.W}).contiguous();
  PSF_CHECK_VALUE(states_kept == 0 || states_kept == layers, "gin_backward: kept must be of 0 or ", layers, " layers, got ", int64_t(states_kept));
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous(), memory = empty({given.parts->packed}, x.options());
  const Tensor d_x = needs_x ? empty_like(x) : Tensor();
  const int64_t count = static_cast<int64_t>(given.tiles.size()), groups = std::clamp<int64_t>(count, 1, gradient_groups), P = given.parts->weights;
  const Tensor sums = needs_weights ? zeros({groups, P}, x.options()) : Tensor();
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const GinCall<T> call = given.packed<T>(weights, memory);
    const T *dy = d_y.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *states = states_kept ? kept.const_data_ptr<T>() : nullptr;
    T *dx = needs_x ? d_x.mutable_data_ptr<T>() : nullptr, *d = needs_weights ? sums.mutable_data_ptr<T>() : nullptr;
    for_each_group<T>(groups, given.scratch<T>(true, true), [&](int64_t group, T* scratch) {
      for (int64_t number = group * count / groups; number < (group + 1) * count / groups; ++number)
        PSF_DISPATCH(gin_tile_gradient<T>(call, given.tiles[number], dy, from, states, dx, d ? d + group * P : nullptr, scratch));
    });
  });
  return {d_x, needs_weights ? sum(sums, {0}) : Tensor()};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&gin>("gin");
  m.add<&gin_backward>("gin_backward");
}

}  // namespace psf
