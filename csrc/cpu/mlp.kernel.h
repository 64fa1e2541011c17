// A multilayer perceptron on a tile of rows, all layers at once. A lane holds mlp_rows rows.
#include "network.kernel.h"

template <class T> void pack_mlp(const MlpCall<T>& call, bool back) {
  for (int64_t k = 0; k < call.sizes.layers; ++k) pack_linear(call.weights, call.layers[k], back);
}

template <class T> struct MlpTile : NetworkTile<T> {
  using Base = NetworkTile<T>;
  using Base::L, Base::take, Base::apply, Base::turn, Base::learn, Base::read, Base::read_gradient, Base::write;
  static constexpr int64_t rows = mlp_rows;
  const MlpCall<T>& call;
  const MlpSizes& sizes;
  T *inputs, *here, *there, *slopes;  // x, and planes of any width

  MlpTile(const MlpCall<T>& call, const Sequences<T>& some, T* memory, bool back) : Base(call.weights, some, memory, call.sizes.widest, back), call(call), sizes(call.sizes) {
    inputs = take(rows * sizes.in), here = take(rows * sizes.widest), there = take(rows * sizes.widest);
    slopes = back ? take(rows * sizes.widest) : nullptr;
  }
  static int64_t scratch(const MlpSizes& sizes, bool back) {  // vectors
    return Base::panel_vectors(sizes.widest, back) + rows * (sizes.in + 3 * sizes.widest + (back ? sizes.kept + sizes.out : 0));
  }
  bool activated(int64_t k) const { return k ? k < sizes.layers || sizes.last : sizes.first; }  // whether an activation follows layer k

  void act(const T* z, int64_t width, T* a) const {
    with_activation(sizes.activation, [&](auto f) { activate<decltype(f), T>(z, rows * width, a); });
  }
  void act_with_slopes(const T* z, int64_t width, T* a) const {
    with_activation(sizes.activation, [&](auto f) { activate_with_slopes<decltype(f), T>(z, rows * width, a, slopes); });
  }
  void turn_act(const T* z, int64_t width, T* d) const {
    with_activation(sizes.activation, [&](auto f) { activation_gradient<decltype(f), T>(z, rows * width, d); });
  }

  // Rows that no lane has are 0.
  void clear(T* plane, int64_t width) const {
    if (Base::sequences.rows < rows) std::memset(plane, 0, rows * width * L * sizeof(T));
  }
  // The last layer's output, and what goes into activations in `kept`, layer after layer; `step` 0: each over the one before.
  const T* forward(const T* x, T* kept, int64_t step) const {
    clear(inputs, sizes.in);
    read(x, rows, sizes.in, inputs);
    if (sizes.first) act(inputs, sizes.in, here);
    const T* a = sizes.first ? here : inputs;
    for (int64_t k = 0; k < sizes.layers; ++k) {
      const LinearPart& layer = call.layers[k];
      const bool ends = !activated(k + 1);
      T* const z = ends ? there : kept;
      apply(layer, a, rows, false, z);
      if (ends) return z;
      act(z, layer.out, here);
      a = here;
      kept += step * rows * layer.out * L;
    }
    return here;
  }
  void backward(const T* dy, const T* x, const T* kept, T* dx, T* d) const {
    clear(inputs, sizes.in);
    read(x, rows, sizes.in, inputs);
    T *d_out = there, *other = here;
    clear(d_out, sizes.out);
    read_gradient(dy, rows, sizes.out, d_out);
    const T* z = kept + rows * sizes.kept * L;  // after what layer k gave
    if (sizes.last) turn_act(z - rows * sizes.out * L, sizes.out, d_out);
    if (sizes.last) z -= rows * sizes.out * L;
    for (int64_t k = sizes.layers; k-- > 0;) {
      const LinearPart& layer = call.layers[k];
      const T* const before = k ? z -= rows * layer.in * L : inputs;
      const T* a = before;
      if (activated(k)) act_with_slopes(before, layer.in, other), a = other;
      learn(layer, d_out, a, rows, d);
      if (!k && !dx) return;
      turn(layer, d_out, rows, false, other);
      if (activated(k)) times_slopes(slopes, rows * layer.in, other);
      std::swap(d_out, other);
    }
    write(dx, rows, sizes.in, d_out);
  }
};

// y of a tile. kept: what a backward pass needs, null if there is none.
template <class T> void mlp_tile(const MlpCall<T>& call, const Sequences<T>& some, const T* x, T* y, T* kept, T* scratch) {
  const MlpTile<T> tile(call, some, scratch, false);
  tile.write(y, mlp_rows, call.sizes.out, tile.forward(x, kept ? kept : tile.memory, kept != nullptr));
}
// dx (null if it is not needed), and d += the gradient of the weights (null likewise). kept: null if it is to be computed.
template <class T> void mlp_tile_gradient(const MlpCall<T>& call, const Sequences<T>& some, const T* dy, const T* x, const T* kept, T* dx, T* d, T* scratch) {
  const MlpTile<T> tile(call, some, scratch, true);
  if (!kept) tile.forward(x, tile.memory, 1);
  tile.backward(dy, x, kept ? kept : tile.memory, dx, d);
}
template <class T> void mlp_scratch(const MlpSizes& sizes, bool back, int64_t& count) { count = MlpTile<T>::scratch(sizes, back) * lanes<T>; }
