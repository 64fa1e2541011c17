// GIN of one linear map a layer on a tile: some samples of one graph, all layers at once. Rows are (node, sample), and a vector
// holds features of one row.
#include "planes.h"
#include "products.h"

template <class F, class T> void activate_some(const T* x, int64_t n, T* y) {
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, value_of<F, T>(load(x + i)));
  if (i < n) store_some(y + i, value_of<F, T>(load_some(x + i, n - i)), n - i);
}
// dy times the slope at x, or for functions whose value gives it where the value is x; in place of dy
template <class F, class T> void activation_gradient_some(const T* x, int64_t n, T* dy) {
  const auto slope = [](Vec<T> v) {
    if constexpr (std::is_same_v<F, Tanh>) return T(1) - v * v;
    else return slope_of<F, T>(v);  // of ReLU the same for both
  };
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) store(dy + i, load(dy + i) * slope(load(x + i)));
  if (i < n) store_some(dy + i, load_some(dy + i, n - i) * slope(load_some(x + i, n - i)), n - i);
}
template <class T> void transpose_weights(const GinCall<T>& call, const LinearPart& part) {
  for (int64_t i = 0; i < part.in; ++i)
    for (int64_t o = 0; o < part.out; ++o) call.transposed[part.forward + i * part.out + o] = call.weights[part.weight + o * part.in + i];
}
template <class T> void pack_gin(const GinCall<T>& call) {
  for (int64_t k = 1; k < call.sizes.layers; ++k) transpose_weights(call, call.layers[k - 1]);
  transpose_weights(call, call.out);
}

template <class T> struct GinTile {
  const GinCall<T>& call;
  const GinTilePlace place;
  const int64_t W, out, s, rows, plane;  // samples, rows, values of all rows
  T *memory, *aggregated, *z, *pooled, *ended, *d_pooled, *d_ended, *d_state, *product;

  GinTile(const GinCall<T>& call, const GinTilePlace& place, T* memory, bool back)
      : call(call), place(place), W(call.sizes.width), out(call.sizes.out), s(place.samples), rows(place.nodes * s), plane(rows * W), memory(memory) {
    aggregated = take(plane), z = take(plane), pooled = take(s * W), ended = take(s * out);
    if (!back) return;
    d_pooled = take(s * W), d_ended = take(s * out), d_state = take(plane), product = take(std::max(W, out) * W);
  }
  T* take(int64_t count) {
    T* const now = memory;
    memory += (count + 15) / 16 * 16;
    return now;
  }
  static int64_t scratch(const GinSizes& sizes, int64_t most_rows, int64_t most_samples, bool back) {
    const int64_t planes = back ? 3 : 2, ends = back ? 2 : 1;
    return planes * most_rows * sizes.width + ends * most_samples * (sizes.width + sizes.out) + (back ? std::max(sizes.width, sizes.out) * sizes.width : 0) + 8 * 16;
  }

  // The tile's rows of x (nodes, S, W), and back.
  void read(const T* x, T* tile) const {
    for (int64_t v = 0; v < place.nodes; ++v)
      std::memcpy(tile + v * s * W, x + ((place.first + v) * call.samples + place.sample) * W, s * W * sizeof(T));
  }
  void write(T* x, const T* tile) const {
    for (int64_t v = 0; v < place.nodes; ++v)
      std::memcpy(x + ((place.first + v) * call.samples + place.sample) * W, tile + v * s * W, s * W * sizeof(T));
  }

  // to[v] = own from[v] + the sum of from over v's neighbours
  void aggregate(const int64_t* begin, const int64_t* neighbors, T own, const T* from, T* to) const {
    const int64_t width = s * W;
    for (int64_t v = 0; v < place.nodes; ++v) {
      T* const sum = to + v * width;
      for (int64_t i = 0; i < width; ++i) sum[i] = own * from[v * width + i];
      for (int64_t e = begin[place.first + v]; e < begin[place.first + v + 1]; ++e) axpy(sum, T(1), from + (neighbors[e] - place.first) * width, width);
    }
  }
  T own(int64_t k) const { return T(1) + call.weights[call.eps + k]; }
  void add_bias(T* x, int64_t count, int64_t width, int64_t bias) const {
    for (int64_t r = 0; r < count; ++r) axpy(x + r * width, T(1), call.weights + bias, width);
  }
  void apply(const LinearPart& part, const T* x, int64_t count, T* y) const {
    products<T>(x, part.in, 1, call.transposed + part.forward, count, part.in, part.out, y);
    add_bias(y, count, part.out, part.bias);
  }
  void learn(const LinearPart& part, const T* dy, const T* x, int64_t count, T* d) const {
    if (!d) return;
    products<T>(dy, 1, part.out, x, part.out, count, part.in, product);
    axpy(d + part.weight, T(1), product, part.out * part.in);
    learn_bias(dy, count, part.out, d + part.bias);
  }
  void learn_bias(const T* dy, int64_t count, int64_t width, T* d) const {
    for (int64_t r = 0; r < count; ++r) axpy(d, T(1), dy + r * width, width);
  }
  void turn(const LinearPart& part, const T* dy, int64_t count, T* dx) const {
    products<T>(dy, part.out, 1, call.weights + part.weight, count, part.out, part.in, dx);
  }
  void activate_rows(const T* x, int64_t n, T* y) const {
    with_activation(call.sizes.activation, [&](auto f) { activate_some<decltype(f), T>(x, n, y); });
  }
  // Whether the slope of the activation follows from its value: then z is not computed again.
  bool by_output() const { return call.sizes.activation == relu_activation || call.sizes.activation == tanh_activation; }
  // from: the activation's value if that gives the slope, else what went into it
  void turn_activation(const T* from, int64_t n, T* dy) const {
    with_activation(call.sizes.activation, [&](auto f) { activation_gradient_some<decltype(f), T>(from, n, dy); });
  }

  // aggregated and, if needed, z of layer k from its input h
  void layer(int64_t k, const T* h, bool needs_z = true) const {
    aggregate(call.in_begin, call.in_neighbors, own(k), h, aggregated);
    if (!needs_z) return;
    if (k) return apply(call.layers[k - 1], aggregated, rows, z);
    std::memcpy(z, aggregated, plane * sizeof(T));
    add_bias(z, rows, W, call.first);
  }
  // pooled and ended from the last layer's output
  void end(const T* h) const {
    std::memset(pooled, 0, s * W * sizeof(T));
    for (int64_t v = 0; v < place.nodes; ++v) axpy(pooled, T(1), h + v * s * W, s * W);
    apply(call.out, pooled, s, ended);
  }
  // states: the input of every layer and the output of the last, `step` values apart; 0 if none is kept. The first is there.
  void forward(T* states, int64_t step) const {
    for (int64_t k = 0; k < call.sizes.layers; ++k) {
      layer(k, states + k * step);
      activate_rows(z, plane, states + (k + 1) * step);
    }
    end(states + call.sizes.layers * step);
  }
  void output(T* y) const {
    if (call.sizes.final) activate_rows(ended, s * out, ended);
    std::memcpy(y + (place.graph * call.samples + place.sample) * out, ended, s * out * sizeof(T));
  }
  void backward(const T* dy, const T* states, T* dx, T* d) const {
    end(states + call.sizes.layers * plane);
    std::memcpy(d_ended, dy + (place.graph * call.samples + place.sample) * out, s * out * sizeof(T));
    if (call.sizes.final && by_output()) activate_rows(ended, s * out, ended);
    if (call.sizes.final) turn_activation(ended, s * out, d_ended);
    learn(call.out, d_ended, pooled, s, d);
    turn(call.out, d_ended, s, d_pooled);
    for (int64_t v = 0; v < place.nodes; ++v) std::memcpy(d_state + v * s * W, d_pooled, s * W * sizeof(T));
    for (int64_t k = call.sizes.layers; k-- > 0;) {
      const T* h = states + k * plane;
      layer(k, h, !by_output());
      turn_activation(by_output() ? states + (k + 1) * plane : z, plane, d_state);
      T* d_aggregated = d_state;
      if (k) {
        learn(call.layers[k - 1], d_state, aggregated, rows, d);
        turn(call.layers[k - 1], d_state, rows, z);
        d_aggregated = z;
      } else if (d) {
        learn_bias(d_state, rows, W, d + call.first);
      }
      if (d) d[call.eps + k] += dot(h, d_aggregated, plane);
      if (k == 0 && !dx) return;
      T* const to = d_aggregated == z ? d_state : z;
      aggregate(call.out_begin, call.out_neighbors, own(k), d_aggregated, to);
      if (k == 0) write(dx, to);
    }
  }
};

// y of a tile. kept (layers, nodes, S, W): each layer's output, null if there is no backward pass.
template <class T> void gin_tile(const GinCall<T>& call, const GinTilePlace& place, const T* x, T* y, T* kept, T* scratch) {
  const GinTile<T> tile(call, place, scratch, false);
  const int64_t step = kept ? tile.plane : 0;
  tile.read(x, tile.memory);
  tile.forward(tile.memory, step);
  for (int64_t k = 1; kept && k <= call.sizes.layers; ++k)
    tile.write(kept + (k - 1) * call.nodes * call.samples * tile.W, tile.memory + k * step);
  tile.output(y);
}
// dx (null if it is not needed), and d += the gradient of the weights (null likewise). kept: null if states are to be computed.
template <class T>
void gin_tile_gradient(const GinCall<T>& call, const GinTilePlace& place, const T* dy, const T* x, const T* kept, T* dx, T* d, T* scratch) {
  const GinTile<T> tile(call, place, scratch, true);
  tile.read(x, tile.memory);
  if (!kept) tile.forward(tile.memory, tile.plane);
  for (int64_t k = 1; kept && k <= call.sizes.layers; ++k)
    tile.read(kept + (k - 1) * call.nodes * call.samples * tile.W, tile.memory + k * tile.plane);
  tile.backward(dy, tile.memory, dx, d);
}
template <class T> void gin_scratch(const GinSizes& sizes, int64_t most_rows, int64_t most_samples, bool back, bool states, int64_t& count) {
  count = GinTile<T>::scratch(sizes, most_rows, most_samples, back) + most_rows * sizes.width * (states ? sizes.layers + 1 : 1);
}
