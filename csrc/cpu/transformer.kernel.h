// A Transformer on a tile of sequences, all layers at once.
#include "network.kernel.h"

// back: the matrices of the gradients too.
template <class T> void pack_transformer(const TransformerCall<T>& call, bool back) {
  const TransformerSizes& sizes = call.sizes;
  if (sizes.in) pack_linear(call.weights, call.parts->embed, back);
  for (int64_t k = 0; k < sizes.layers; ++k)
    for (const LinearPart* part : {&call.blocks[k].query, &call.blocks[k].key_value, &call.blocks[k].out, &call.blocks[k].up, &call.blocks[k].down})
      pack_linear(call.weights, *part, back);
  if (sizes.out)
    for (const LinearPart* part : {&call.parts->hidden, &call.parts->head}) pack_linear(call.weights, *part, back);
}

template <class T> struct TransformerTile : NetworkTile<T> {
  using Base = NetworkTile<T>;
  using Base::L, Base::sequences, Base::take, Base::at, Base::apply, Base::turn, Base::learn, Base::read, Base::read_gradient, Base::write;
  const TransformerCall<T>& call;
  const TransformerSizes& sizes;
  const int64_t W, F, tokens, outputs;  // tokens: of the longest sequence here
  const bool back;
  typename Lanes<T>::Int length[lanes<T>];
  // What a block computes, rows of features: see `block`.
  T *norm1, *moments1, *key_value, *query, *weights, *attended, *middle, *norm2, *moments2, *up, *active, *chosen;
  // Gradients.
  T *d_out, *d_wide, *d_query, *d_narrow, *d_weights;

  TransformerTile(const TransformerCall<T>& call, const Sequences<T>& sequences, T* memory, bool back)
      : Base(call.weights, sequences, memory, call.sizes.widest_map(), back), call(call), sizes(call.sizes), W(sizes.width), F(sizes.feedforward), tokens(sequences.rows),
        outputs(sizes.read ? sizes.outputs : tokens), back(back) {
    for (int l = 0; l < L; ++l) length[l] = static_cast<typename Lanes<T>::Int>(l < sequences.count ? sequences.length[l] : tokens);
    const int64_t narrow = tokens * W, wide = tokens * sizes.widest();
    norm1 = take(narrow), moments1 = take(2 * tokens), key_value = take(2 * narrow), query = take(narrow), attended = take(narrow);
    middle = take(narrow), norm2 = take(narrow), moments2 = take(2 * tokens), up = take(wide), active = back ? take(wide) : up;
    weights = take(tokens * tokens * (back ? sizes.heads : 1)), chosen = take(outputs * W);
    if (!back) return;
    d_out = take(narrow), d_wide = take(2 * narrow + wide), d_query = take(narrow), d_narrow = take(narrow), d_weights = take(tokens * tokens);
  }
  static int64_t scratch(const TransformerSizes& sizes, bool back) {  // vectors
    const int64_t N = sizes.tokens, W = sizes.width, wide = sizes.widest(), forward = N * (7 * W + 4 + wide + N) + sizes.outputs * W;
    return Base::panel_vectors(sizes.widest_map(), back) + forward + (back ? N * (5 * W + 2 * wide + N * sizes.heads) : 0);
  }

  void normalise(const NormPart& part, const T* x, int64_t rows, T* y, T* moments) const {
    layer_norm<T>(x, rows, W, at(part.gain), at(part.shift), T(sizes.eps), y, moments);
  }
  void turn_norm(const NormPart& part, T* dy, const T* x, const T* moments, int64_t rows, bool add, T* dx, T* d) const {
    layer_norm_gradient<T>(dy, x, moments, rows, W, at(part.gain), add, dx, d ? d + part.gain : nullptr, d ? d + part.shift : nullptr);
  }
  void choose(const T* rows, T* to) const {
    for (int64_t r = 0; r < outputs; ++r) std::memcpy(to + r * W * L, rows + sizes.read[r] * W * L, W * L * sizeof(T));
  }

  void attend(int64_t rows) const {
    const int64_t width = W / sizes.heads;
    for (int64_t head = 0; head < sizes.heads; ++head) {
      const T *q = query + head * width * L, *k = key_value + head * width * L, *v = k + W * L;
      T* p = weights + (back ? head * tokens * tokens * L : 0);
      lane_products<T>({q, W * L, L}, {k, 2 * W * L, L}, rows, tokens, width, p, tokens * L, L);
      softmax<T>(p, rows, tokens, T(1) / std::sqrt(T(width)), sequences.ragged ? length : nullptr);
      lane_products<T>({p, tokens * L, L}, {v, L, 2 * W * L}, rows, width, tokens, attended + head * width * L, W * L, L);
    }
  }
  // d_attended -> d_query, d_key_value
  void turn_attention(int64_t rows, const T* d_attended, T* d_key_value) const {
    const int64_t width = W / sizes.heads;
    for (int64_t head = 0; head < sizes.heads; ++head) {
      const T *q = query + head * width * L, *k = key_value + head * width * L, *v = k + W * L, *d = d_attended + head * width * L;
      const T* p = weights + head * tokens * tokens * L;
      T* const d_k = d_key_value + head * width * L;
      lane_products<T>({d, W * L, L}, {v, 2 * W * L, L}, rows, tokens, width, d_weights, tokens * L, L);
      lane_products<T>({p, L, tokens * L}, {d, L, W * L}, tokens, width, rows, d_k + W * L, 2 * W * L, L);
      softmax_gradient<T>(p, d_weights, rows, tokens, T(1) / std::sqrt(T(width)));
      lane_products<T>({d_weights, tokens * L, L}, {k, L, 2 * W * L}, rows, width, tokens, d_query + head * width * L, W * L, L);
      lane_products<T>({d_weights, L, tokens * L}, {q, L, W * L}, tokens, width, rows, d_k, 2 * W * L, L);
    }
  }

  // Rows of the block's output: only those that are read in the last one.
  bool chooses(int64_t k) const { return sizes.read && k + 1 == sizes.layers; }
  int64_t rows_of(int64_t k) const { return chooses(k) ? outputs : tokens; }

  // Everything of block k that its gradient needs, from its input x (tokens, W); the output too if there is a place for it,
  // which may be x, or else the slopes of `active` in the place of `up`.
  void block(int64_t k, const T* x, T* y) const {
    const BlockPart& part = call.blocks[k];
    const int64_t rows = rows_of(k);
    normalise(part.before_attention, x, tokens, norm1, moments1);
    apply(part.key_value, norm1, tokens, false, key_value);
    if (chooses(k)) choose(norm1, chosen);
    apply(part.query, chooses(k) ? chosen : norm1, rows, false, query);
    attend(rows);
    if (chooses(k)) choose(x, middle);
    else std::memcpy(middle, x, rows * W * L * sizeof(T));
    apply(part.out, attended, rows, true, middle);
    normalise(part.before_feedforward, middle, rows, norm2, moments2);
    apply(part.up, norm2, rows, false, up);
    if (!y) {
      if (sizes.gelu) activate_with_slopes<Gelu, T>(up, rows * F, active, up);
      else activate_with_slopes<Relu, T>(up, rows * F, active, up);
      return;
    }
    if (sizes.gelu) activate<Gelu, T>(up, rows * F, active);
    else activate<Relu, T>(up, rows * F, active);
    std::memcpy(y, middle, rows * W * L * sizeof(T));
    apply(part.down, active, rows, true, y);
  }
  // dy (rows, W) of its output -> of its input (tokens, W), in the same place; d: gradients of the weights.
  void turn_block(int64_t k, const T* x, T* dy, T* d) const {
    const BlockPart& part = call.blocks[k];
    const int64_t rows = rows_of(k);
    block(k, x, nullptr);
    learn(part.down, dy, active, rows, d);
    turn(part.down, dy, rows, false, d_wide);
    times_slopes(up, rows * F, d_wide);
    learn(part.up, d_wide, norm2, rows, d);
    turn(part.up, d_wide, rows, false, d_narrow);
    turn_norm(part.before_feedforward, d_narrow, middle, moments2, rows, true, dy, d);
    learn(part.out, dy, attended, rows, d);
    turn(part.out, dy, rows, false, d_narrow);
    turn_attention(rows, d_narrow, d_wide);
    learn(part.key_value, d_wide, norm1, tokens, d);
    learn(part.query, d_query, chooses(k) ? chosen : norm1, rows, d);
    turn(part.key_value, d_wide, tokens, false, d_narrow);
    if (!chooses(k)) {
      turn(part.query, d_query, rows, true, d_narrow);
    } else {  // from the rows that are read to all
      turn(part.query, d_query, rows, false, chosen);
      spread(chosen, d_narrow);
      std::memcpy(chosen, dy, rows * W * L * sizeof(T));
      std::memset(dy, 0, tokens * W * L * sizeof(T));
      spread(chosen, dy);
    }
    turn_norm(part.before_attention, d_narrow, x, moments1, tokens, true, dy, d);
  }
  void spread(const T* from, T* to) const {
    for (int64_t r = 0; r < outputs; ++r)
      for (int64_t i = 0; i < W; ++i) {
        T* const into = to + (sizes.read[r] * W + i) * L;
        store(into, load(into) + load(from + (r * W + i) * L));
      }
  }

  // The input of the first block.
  void embed(const T* x, T* state) const {
    read(x, sizes.tokens, sizes.input(), sizes.in ? up : state);
    if (!sizes.in) return;
    apply(call.parts->embed, up, tokens, false, state);
    for (int64_t i = 0; i < tokens * W; ++i) store(state + i * L, load(state + i * L) + *at(call.parts->positions + i));
  }
  // State (outputs, W) after the last block -> norm2, its ReLU in query, the hidden layer in up, its ReLU in attended.
  void head(const T* state) const {
    normalise(call.parts->last, state, outputs, norm2, moments2);
    activate<Relu, T>(norm2, outputs * W, query);
    apply(call.parts->hidden, query, outputs, false, up);
    activate<Relu, T>(up, outputs * W, attended);
  }

  // states: the input of every block and the output of the last, `step` values apart; 0 if none is kept.
  void forward(const T* x, T* states, int64_t step) const {
    embed(x, states);
    for (int64_t k = 0; k < sizes.layers; ++k) block(k, states + k * step, states + (k + 1) * step);
  }
  void output(const T* states, T* y) const {
    if (!sizes.out) return write(y, sizes.outputs, W, states);
    head(states);
    apply(call.parts->head, attended, outputs, false, up);
    write(y, sizes.outputs, sizes.out, up);
  }
  void backward(const T* dy, const T* x, const T* states, int64_t step, T* dx, T* d) const {
    const T* last = states + sizes.layers * step;
    if (sizes.out) {
      const TransformerParts& parts = *call.parts;
      head(last);
      read_gradient(dy, sizes.outputs, sizes.out, d_wide);
      learn(parts.head, d_wide, attended, outputs, d);
      turn(parts.head, d_wide, outputs, false, d_narrow);
      activation_gradient<Relu, T>(up, outputs * W, d_narrow);
      learn(parts.hidden, d_narrow, query, outputs, d);
      turn(parts.hidden, d_narrow, outputs, false, d_query);
      activation_gradient<Relu, T>(norm2, outputs * W, d_query);
      turn_norm(parts.last, d_query, last, moments2, outputs, false, d_out, d);
    } else {
      read_gradient(dy, sizes.outputs, W, d_out);
    }
    for (int64_t k = sizes.layers; k-- > 0;) turn_block(k, states + k * step, d_out, d);
    if (!sizes.in) {
      if (dx) write(dx, sizes.tokens, W, d_out);
      return;
    }
    for (int64_t i = 0; d && i < tokens * W; ++i) d[call.parts->positions + i] += lane_sum<T>(load(d_out + i * L));
    read(x, sizes.tokens, sizes.in, up);
    learn(call.parts->embed, d_out, up, tokens, d);
    if (!dx) return;
    turn(call.parts->embed, d_out, tokens, false, up);
    write(dx, sizes.tokens, sizes.in, up);
  }
};

// y of a tile. kept: the states that a backward pass needs, null if there is none.
template <class T> void transformer_tile(const TransformerCall<T>& call, const Sequences<T>& sequences, const T* x, T* y, T* kept, T* scratch) {
  const TransformerTile<T> tile(call, sequences, scratch, false);
  T* const states = kept ? kept : tile.memory;
  const int64_t step = kept ? call.sizes.state() * lanes<T> : 0;
  tile.forward(x, states, step);
  tile.output(states + call.sizes.layers * step, y);
}
// dx (null if it is not needed), and d += the gradient of the weights (null likewise). kept: null if the states are to be computed.
template <class T>
void transformer_tile_gradient(const TransformerCall<T>& call, const Sequences<T>& sequences, const T* dy, const T* x, const T* kept, T* dx, T* d, T* scratch) {
  const TransformerTile<T> tile(call, sequences, scratch, true);
  const int64_t step = call.sizes.state() * lanes<T>;
  if (!kept) tile.forward(x, tile.memory, step);
  tile.backward(dy, x, kept ? kept : tile.memory, step, dx, d);
}
template <class T> void transformer_scratch(const TransformerSizes& sizes, bool back, int64_t& count) {
  count = (TransformerTile<T>::scratch(sizes, back) + sizes.state() * (back ? sizes.layers + 1 : 1)) * lanes<T>;
}
