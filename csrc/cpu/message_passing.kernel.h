// Message passing on a tile of complete graphs, all layers at once.
#include "network.kernel.h"

template <class T> void pack_message_passing(const MessageCall<T>& call, bool back) {
  const MessageParts& parts = *call.parts;
  for (const LinearPart* part : {&parts.embed, &parts.hidden, &parts.out}) pack_linear(call.weights, *part, back);
  for (int64_t k = 0; k < call.sizes.layers; ++k) {
    const MessagePart& layer = call.layers[k];
    for (const LinearPart* part : {&layer.receiver, &layer.sender, &layer.edge, &layer.message, &layer.node, &layer.received, &layer.update})
      pack_linear(call.weights, *part, back);
  }
}

template <class T> struct MessageTile : NetworkTile<T> {
  using Base = NetworkTile<T>;
  using Base::L, Base::take, Base::apply, Base::turn, Base::learn, Base::read, Base::read_gradient, Base::write;
  const MessageCall<T>& call;
  const MessageSizes& sizes;
  const int64_t n, W;  // nodes, width
  const int64_t some;  // receivers at a time: their pairs are rows of the first planes
  const bool back;
  T *edges, *before, *pair, *message, *receiver, *sender, *received, *first, *updated, *inputs;
  T *d_out, *d_pair, *d_message, *d_first, *d_received, *d_sender, *d_receiver, *d_edges;  // gradients

  MessageTile(const MessageCall<T>& call, const Sequences<T>& graphs, T* memory, bool back, bool needs_edges)
      : Base(call.weights, graphs, memory, call.sizes.widest(), back), call(call), sizes(call.sizes), n(sizes.nodes), W(sizes.width), some(sizes.receivers()), back(back) {
    const int64_t pairs = some * (n - 1);
    edges = take(some * n * sizes.edge);  // with room for the loops, which are read and left out
    pair = take(pairs * W), message = take(pairs * W), before = back ? take(pairs * W) : pair;
    receiver = take(n * W), sender = take(n * W), received = take(n * W), first = take(n * W), updated = take(n * W);
    inputs = take(n * sizes.widest());
    if (!back) return;
    d_out = take(n * W), d_pair = take(pairs * W), d_message = take(pairs * W), d_first = take(n * W), d_received = take(n * W);
    d_sender = take(n * W), d_receiver = take(n * W), d_edges = take(needs_edges ? n * n * sizes.edge : 0);
  }
  static int64_t scratch(const MessageSizes& sizes, bool back, bool needs_edges) {  // vectors
    const int64_t n = sizes.nodes, pairs = sizes.receivers() * (n - 1), W = sizes.width;
    const int64_t forward = sizes.receivers() * n * sizes.edge + 2 * pairs * W + 5 * n * W + n * sizes.widest();
    return Base::panel_vectors(sizes.widest(), back) + forward + (back ? 3 * pairs * W + 5 * n * W + (needs_edges ? n * n * sizes.edge : 0) : 0);
  }

  // f(first, count) for receivers, a few at a time.
  template <class F> void for_receivers(F f) const {
    for (int64_t i = 0; i < n; i += some) f(i, std::min(some, n - i));
  }
  // f(row, receiver i, sender j) for the pairs of `count` receivers from the first on.
  template <class F> void for_pairs(int64_t from, int64_t count, F f) const {
    for (int64_t i = 0, row = 0; i < count; ++i)
      for (int64_t j = 0; j < n; ++j)
        if (j != from + i) f(row++, from + i, j);
  }
  static void add_row(T* to, const T* from, int64_t width) {
    for (int64_t f = 0; f < width * L; f += L) store(to + f, load(to + f) + load(from + f));
  }

  // y = SiLU(x). For a backward pass x becomes the slopes.
  void activate_here(T* x, int64_t count, T* y) const {
    if (back) activate_with_slopes<Silu, T>(x, count, y, x);
    else activate<Silu, T>(x, count, y);
  }
  // pair (the messages' first activation), its slopes in `before`, and message of the pairs of `count` receivers.
  void messages(const MessagePart& part, const T* given_edges, int64_t from, int64_t count) const {
    const int64_t rows = count * (n - 1), row = sizes.edge * L;
    if (sizes.edge) {
      read(given_edges + from * n * sizes.edge, count * n, sizes.edge, edges, call.share, n * n);
      for_pairs(from, count, [&](int64_t r, int64_t i, int64_t j) { std::memmove(edges + r * row, edges + ((i - from) * n + j) * row, row * sizeof(T)); });
    }
    apply(part.edge, edges, rows, false, before);
    for_pairs(from, count, [&](int64_t r, int64_t i, int64_t j) {
      T* const to = before + r * W * L;
      for (int64_t f = 0; f < W * L; f += L) store(to + f, load(to + f) + (load(receiver + i * W * L + f) + load(sender + j * W * L + f)));
    });
    activate_here(before, rows * W, pair);
    apply(part.message, pair, rows, false, message);
  }
  // received: the sum of SiLU(message) over senders. For a backward pass its slopes take the place of message.
  template <bool slopes> void receive(int64_t from, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t f = 0; f < W * L; f += L) {
        Vec<T> sum{}, slope;
        for (int64_t j = 0; j < n - 1; ++j) {
          T* const one = message + (i * (n - 1) + j) * W * L + f;
          sum += Silu::value<T>(load(one), slope);
          if constexpr (slopes) store(one, slope);
        }
        store(received + (from + i) * W * L + f, sum);
      }
  }
  void receive_messages(const MessagePart& part, const T* given_edges, int64_t from, int64_t count) const {
    messages(part, given_edges, from, count);
    if (back) receive<true>(from, count);
    else receive<false>(from, count);
  }
  // What a layer's gradient needs, from its input h (n, W); the output too if there is a place for it. The pairs are those of the
  // last receivers.
  void layer(const MessagePart& part, const T* h, const T* given_edges, T* y) const {
    apply(part.receiver, h, n, false, receiver, false);
    apply(part.sender, h, n, false, sender, false);
    for_receivers([&](int64_t from, int64_t count) { receive_messages(part, given_edges, from, count); });
    apply(part.node, h, n, false, first);
    apply(part.received, received, n, true, first, false);
    activate_here(first, n * W, updated);
    if (y) apply(part.update, updated, n, false, y);
  }
  // dy (n, W) of its output -> of its input, in the same place; d: gradients of the weights.
  void turn_layer(const MessagePart& part, const T* h, const T* given_edges, T* dy, T* d, bool needs_edges) const {
    layer(part, h, given_edges, nullptr);
    learn(part.update, dy, updated, n, d);
    turn(part.update, dy, n, false, d_first);
    times_slopes(first, n * W, d_first);
    learn(part.node, d_first, h, n, d);
    learn(part.received, d_first, received, n, d, false);
    turn(part.node, d_first, n, false, dy);
    turn(part.received, d_first, n, false, d_received);
    std::memset(d_receiver, 0, n * W * L * sizeof(T));
    std::memset(d_sender, 0, n * W * L * sizeof(T));
    for_receivers([&](int64_t from, int64_t count) {
      const int64_t rows = count * (n - 1);
      if (some < n) receive_messages(part, given_edges, from, count);
      for_pairs(from, count, [&](int64_t r, int64_t i, int64_t) { std::memcpy(d_message + r * W * L, d_received + i * W * L, W * L * sizeof(T)); });
      times_slopes(message, rows * W, d_message);
      learn(part.message, d_message, pair, rows, d);
      turn(part.message, d_message, rows, false, d_pair);
      times_slopes(before, rows * W, d_pair);
      if (sizes.edge) learn(part.edge, d_pair, edges, rows, d);
      if (needs_edges) turn(part.edge, d_pair, rows, true, d_edges + from * (n - 1) * sizes.edge * L);
      for_pairs(from, count, [&](int64_t r, int64_t i, int64_t j) {
        add_row(d_receiver + i * W * L, d_pair + r * W * L, W);
        add_row(d_sender + j * W * L, d_pair + r * W * L, W);
      });
    });
    learn(part.receiver, d_receiver, h, n, d, !sizes.edge);
    learn(part.sender, d_sender, h, n, d, false);
    turn(part.receiver, d_receiver, n, true, dy);
    turn(part.sender, d_sender, n, true, dy);
  }

  // states: the input of every layer and the output of the last, `step` values apart; 0 if none is kept.
  void forward(const T* x, const T* given_edges, T* states, int64_t step) const {
    read(x, n, sizes.in, inputs);
    apply(call.parts->embed, inputs, n, false, states);
    for (int64_t k = 0; k < sizes.layers; ++k) layer(call.layers[k], states + k * step, given_edges, states + (k + 1) * step);
  }
  void decode(const T* state) const {
    apply(call.parts->hidden, state, n, false, first);
    activate_here(first, n * W, updated);
  }
  void output(const T* states, T* y) const {
    decode(states);
    apply(call.parts->out, updated, n, false, inputs);
    write(y, n, sizes.out, inputs);
  }
  void backward(const T* dy, const T* x, const T* given_edges, const T* states, int64_t step, T* dx, T* d_given_edges, T* d) const {
    const MessageParts& parts = *call.parts;
    const T* last = states + sizes.layers * step;
    decode(last);
    read_gradient(dy, n, sizes.out, inputs);
    learn(parts.out, inputs, updated, n, d);
    turn(parts.out, inputs, n, false, d_first);
    times_slopes(first, n * W, d_first);
    learn(parts.hidden, d_first, last, n, d);
    turn(parts.hidden, d_first, n, false, d_out);
    if (d_given_edges) std::memset(d_edges, 0, n * n * sizes.edge * L * sizeof(T));
    for (int64_t k = sizes.layers; k-- > 0;) turn_layer(call.layers[k], states + k * step, given_edges, d_out, d, d_given_edges != nullptr);
    read(x, n, sizes.in, inputs);
    learn(parts.embed, d_out, inputs, n, d);
    if (dx) {
      turn(parts.embed, d_out, n, false, inputs);
      write(dx, n, sizes.in, inputs);
    }
    if (d_given_edges) {  // back between the loops, whose gradient is 0
      const int64_t row = sizes.edge * L;
      for (int64_t i = n; i-- > 0;)
        for (int64_t j = n; j-- > 0;) {
          T* const to = d_edges + (i * n + j) * row;
          if (i == j) std::memset(to, 0, row * sizeof(T));
          else std::memmove(to, d_edges + (i * (n - 1) + j - (j > i)) * row, row * sizeof(T));
        }
      write(d_given_edges, n * n, sizes.edge, d_edges);
    }
  }
};

// y of a tile. kept: the states that a backward pass needs, null if there is none.
template <class T>
void message_tile(const MessageCall<T>& call, const Sequences<T>& graphs, const T* x, const T* edges, T* y, T* kept, T* scratch) {
  const MessageTile<T> tile(call, graphs, scratch, false, false);
  T* const states = kept ? kept : tile.memory;
  const int64_t step = kept ? call.sizes.state() * lanes<T> : 0;
  tile.forward(x, edges, states, step);
  tile.output(states + call.sizes.layers * step, y);
}
// dx, d_edges (null if not needed), and d += the gradient of the weights (null likewise). kept: null if the states are to be
// computed.
template <class T>
void message_tile_gradient(const MessageCall<T>& call, const Sequences<T>& graphs, const T* dy, const T* x, const T* edges, const T* kept, T* dx, T* d_edges, T* d, T* scratch) {
  const MessageTile<T> tile(call, graphs, scratch, true, d_edges != nullptr);
  const int64_t step = call.sizes.state() * lanes<T>;
  if (!kept) tile.forward(x, edges, tile.memory, step);
  tile.backward(dy, x, edges, kept ? kept : tile.memory, step, dx, d_edges, d);
}
template <class T> void message_scratch(const MessageSizes& sizes, bool back, bool needs_edges, int64_t& count) {
  count = (MessageTile<T>::scratch(sizes, back, needs_edges) + sizes.state() * (back ? sizes.layers + 1 : 1)) * lanes<T>;
}
