// A Transformer on a tile of sequences, all layers at once.
#include "planes.h"

template <class T> void pack_linear(const TransformerCall<T>& call, const LinearPart& part, bool back) {
  pack(call.weights + part.weight, part.out, part.in, part.in, 1, call.packed + part.forward);
  if (back) pack(call.weights + part.weight, part.in, part.out, 1, part.in, call.packed + part.back);
}
// back: the matrices of the gradients too.
template <class T> void pack_transformer(const TransformerCall<T>& call, bool back) {
  const TransformerSizes& sizes = call.sizes;
  if (sizes.in) pack_linear(call, call.parts->embed, back);
  for (int64_t k = 0; k < sizes.layers; ++k)
    for (const LinearPart* part : {&call.blocks[k].query, &call.blocks[k].key_value, &call.blocks[k].out, &call.blocks[k].up, &call.blocks[k].down})
      pack_linear(call, *part, back);
  if (sizes.out)
    for (const LinearPart* part : {&call.parts->hidden, &call.parts->head}) pack_linear(call, *part, back);
}

template <class T> struct TransformerTile {
  static constexpr int64_t L = lanes<T>;
  const TransformerCall<T>& call;
  const TransformerSizes& sizes;
  const Sequences<T>& sequences;
  const int64_t W, F, tokens, outputs;
  const bool back, selects;
  typename Lanes<T>::Int length[lanes<T>];
  T *memory, *first;
  // what a block computes, rows of features: see `block`
  T *norm1, *moments1, *key_value, *chosen, *chosen_norm, *query, *weights, *attended, *middle, *norm2, *moments2, *up, *active;
  // gradients
  T *d_out, *d_wide, *d_query, *d_narrow, *d_weights, *panel;

  T* take(int64_t vectors) {
    T* const now = memory;
    memory += vectors * L;
    return now;
  }
  TransformerTile(const TransformerCall<T>& call, const Sequences<T>& sequences, T* memory, bool back)
      : call(call), sizes(call.sizes), sequences(sequences), W(sizes.width), F(sizes.feedforward), tokens(sequences.tokens),
        outputs(sizes.read ? sizes.outputs : tokens), back(back), selects(sizes.read != nullptr), memory(memory) {
    for (int l = 0; l < L; ++l) length[l] = static_cast<typename Lanes<T>::Int>(sequences.length[l] ? sequences.length[l] : tokens);
    norm1 = take(tokens * W), moments1 = take(2 * tokens), key_value = take(2 * tokens * W);
    query = take(tokens * W), attended = take(tokens * W), middle = take(tokens * W), norm2 = take(tokens * W), moments2 = take(2 * tokens);
    chosen = take(outputs * W), chosen_norm = take(outputs * W);
    up = take(tokens * wide()), active = back ? take(tokens * wide()) : up;
    weights = take(tokens * tokens * (back ? sizes.heads : 1));
    if (!back) return;
    d_out = take(tokens * W), d_wide = take(tokens * std::max(2 * W, wide())), d_query = take(tokens * W), d_narrow = take(tokens * W);
    d_weights = take(tokens * tokens);
    panel = take(panel_size<T>(wide()) / L);
  }
  int64_t wide() const { return sizes.widest(); }
  // Vectors of scratch; with `states` also the input of every layer.
  static int64_t scratch(const TransformerSizes& sizes, bool back) {
    const int64_t W = sizes.width, N = sizes.tokens, wide = sizes.widest();
    const int64_t forward = N * (8 * W + 4) + 2 * sizes.outputs * W + N * wide + N * N;
    return forward + (back ? N * wide + N * N * sizes.heads + N * (3 * W + std::max(2 * W, wide)) + block_rows * (wide + L) : 0);
  }

  // --- memory ---

  // Rows of sequence l out of `rows` in memory: all but in ragged batches.
  void places(int64_t rows, int64_t width, int64_t* start, int64_t* count) const {
    for (int l = 0; l < L; ++l) {
      start[l] = sequences.number[l] * rows * width;
      count[l] = l < sequences.count ? (sequences.ragged ? sequences.length[l] : rows) * width : 0;
    }
  }
  void read(const T* x, int64_t rows, int64_t width, T* plane) const {  // x (M, rows, width)
    int64_t start[L], count[L];
    places(rows, width, start, count);
    load_lanes(x, start, count, std::min(rows, tokens) * width, plane);
  }
  void write(T* y, int64_t rows, int64_t width, const T* plane) const {
    int64_t start[L], count[L];
    places(rows, width, start, count);
    store_lanes(y, start, count, std::min(rows, tokens) * width, plane);
  }

  // --- the steps ---

  const T* at(int64_t offset) const { return call.weights + offset; }
  void apply(const LinearPart& part, const T* x, int64_t rows, bool add, T* y, int64_t y_step = 0) const {
    linear<T>(x, part.in * L, rows, call.packed + part.forward, at(part.bias), part.in, part.out, add, y, y_step ? y_step : part.out * L);
  }
  // The gradient of the part's input, from that of its output.
  void turn(const LinearPart& part, const T* dy, int64_t rows, bool add, T* dx) const {
    linear<T>(dy, part.out * L, rows, call.packed + part.back, nullptr, part.out, part.in, add, dx, part.in * L);
  }
  void learn(const LinearPart& part, const T* dy, const T* x, int64_t rows, T* d) const {
    if (d) weight_gradient<T>(dy, part.out * L, x, part.in * L, rows, part.in, part.out, panel, d + part.weight, d + part.bias);
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
  bool chooses(int64_t k) const { return selects && k + 1 == sizes.layers; }
  int64_t rows_of(int64_t k) const { return chooses(k) ? outputs : tokens; }

  // Everything of block k that its gradient needs, from its input x (tokens, W); the output too if there is a place for it,
  // which may be x.
  void block(int64_t k, const T* x, T* y) const {
    const BlockPart& part = call.blocks[k];
    const int64_t rows = rows_of(k);
    normalise(part.before_attention, x, tokens, norm1, moments1);
    apply(part.key_value, norm1, tokens, false, key_value);
    if (chooses(k)) choose(norm1, chosen_norm);
    apply(part.query, chooses(k) ? chosen_norm : norm1, rows, false, query);
    attend(rows);
    if (chooses(k)) choose(x, middle);
    else std::memcpy(middle, x, rows * W * L * sizeof(T));
    apply(part.out, attended, rows, true, middle);
    normalise(part.before_feedforward, middle, rows, norm2, moments2);
    apply(part.up, norm2, rows, false, up);
    if (sizes.gelu) activate<Gelu, T>(up, rows * F, active);
    else activate<Relu, T>(up, rows * F, active);
    if (!y) return;
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
    if (sizes.gelu) activation_gradient<Gelu, T>(up, rows * F, d_wide);
    else activation_gradient<Relu, T>(up, rows * F, d_wide);
    learn(part.up, d_wide, norm2, rows, d);
    turn(part.up, d_wide, rows, false, d_narrow);
    turn_norm(part.before_feedforward, d_narrow, middle, moments2, rows, true, dy, d);
    learn(part.out, dy, attended, rows, d);
    turn(part.out, dy, rows, false, d_narrow);
    turn_attention(rows, d_narrow, d_wide);
    learn(part.key_value, d_wide, norm1, tokens, d);
    learn(part.query, d_query, chooses(k) ? chosen_norm : norm1, rows, d);
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
    for (int64_t i = 0; i < tokens * W; ++i) store(state + i * L, load(state + i * L) + call.weights[call.parts->positions + i]);
  }
  // State (outputs, W) after the last block -> norm2, its ReLU in query, the hidden layer in up, its ReLU in attended.
  void head(const T* state) const {
    normalise(call.parts->norm, state, outputs, norm2, moments2);
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
      read(dy, sizes.outputs, sizes.out, d_wide);
      learn(parts.head, d_wide, attended, outputs, d);
      turn(parts.head, d_wide, outputs, false, d_narrow);
      activation_gradient<Relu, T>(up, outputs * W, d_narrow);
      learn(parts.hidden, d_narrow, query, outputs, d);
      turn(parts.hidden, d_narrow, outputs, false, d_query);
      activation_gradient<Relu, T>(norm2, outputs * W, d_query);
      turn_norm(parts.norm, d_query, last, moments2, outputs, false, d_out, d);
    } else {
      read(dy, sizes.outputs, W, d_out);
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
