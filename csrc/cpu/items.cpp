// The four sums of items.h: their blocks, and how threads share them.
#include "items.h"

#include "product.h"
#include "rows.h"
#define PSF_KERNEL "items.kernel.h"
#include "each_isa.h"

#include <numeric>

namespace psf {

namespace {

constexpr int64_t block_bytes = 256;       // of a packed block of the width: many weight rows fit the L2 cache
constexpr int64_t most_terms = 1 << 24;  // in a list, 12 or 16 bytes each
constexpr double gemm_gain = 5;            // speed of a product in a GEMM relative to one in a dot
constexpr int64_t gemm_bytes = 2 << 20;    // of the products kept at a time: they fit the cache

// Stable counting sort: where the elements of each key begin, and the elements by key.
void sort_by(const int64_t* key, int64_t count, int64_t keys, std::vector<int64_t>& begin, std::vector<int64_t>& sorted) {
  begin.assign(keys + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++begin[key[i] + 1];
  for (int64_t i = 0; i < keys; ++i) begin[i + 1] += begin[i];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  sorted.resize(count);
  for (int64_t i = 0; i < count; ++i) sorted[next[key[i]]++] = i;
}

// Whether to pack blocks: enough terms that each weight row is read often, but few enough to list.
bool is_dense(const Items& items, IntArrayRef W, int64_t L) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();  // most rows that a term can index
  const int64_t terms = items.M * items.S;
  return items.B * items.S * L <= most && W[0] * W[1] <= most && terms > 2 * W[0] * W[1] && terms * W[1] < most_terms && W[2] >= 16;
}

template <class T> std::vector<Term<T>> terms_of(const Items& items, const Axis& axis, const Tensor& values, int64_t L) {
  std::vector<Term<T>> terms;
  terms.reserve(items.M * items.S);
  for (int64_t i = 0; i < items.B * items.S; ++i)
    PSF_DISPATCH(list_terms<T>(axis, items.sample(i / items.S, i % items.S), values.const_data_ptr<T>(), values.size(1), i * L, &terms));
  return terms;
}

// The transposed terms, stably sorted by the new `to`.
template <class T> std::vector<Term<T>> by_weight_row(const std::vector<Term<T>>& terms, int64_t rows) {
  std::vector<int64_t> next(rows + 1);
  for (const Term<T>& x : terms) ++next[x.from + 1];
  for (int64_t row = 0; row < rows; ++row) next[row + 1] += next[row];
  std::vector<Term<T>> sorted(terms.size());
  for (const Term<T>& x : terms) sorted[next[x.from]++] = {x.from, x.to, x.value};
  return sorted;
}

// Whether the terms fill enough of a matrix (to, from) for a GEMM to be faster than adding rows.
template <class T> bool fills(const std::vector<Term<T>>& terms, int64_t to, int64_t from) {
  return gemm_gain * static_cast<double>(terms.size()) > static_cast<double>(to) * static_cast<double>(from);
}

// The terms as a matrix (to, from).
template <class T> Tensor matrix_of(const std::vector<Term<T>>& terms, int64_t to, int64_t from, TensorOptions options) {
  const Tensor matrix = zeros({to, from}, options);
  T* sums = matrix.mutable_data_ptr<T>();
  for (const Term<T>& x : terms) sums[x.to * from + x.from] += x.value;
  return matrix;
}

// (j N + i) C + c for row (i N + j) C + c.
std::vector<int32_t> transposed_rows(int64_t N, int64_t C) {
  std::vector<int32_t> rows(N * N * C);
  for (int64_t row = 0; row < N * N * C; ++row) rows[row] = static_cast<int32_t>((row / C % N * N + row / C / N) * C + row % C);
  return rows;
}

// out[to] += scale value in[from] over all terms, in blocks of the width. pack(row, first, count, memory) fetches a row of
// the `rows` rows of `in`; out (*, D). fresh: out[to] = the sum, for terms sorted by `to`, and out[mirror[to]] too.
template <class T, class Pack>
void add_products(const std::vector<Term<T>>& terms, T scale, Pack pack, int64_t rows, T* out, int64_t D, bool fresh, const int32_t* mirror = nullptr) {
  constexpr int64_t block = block_bytes / sizeof(T);
  for_each_group<T>((D + block - 1) / block, rows * block, [&](int64_t group, T* memory) {
    const int64_t from = group * block, width = std::min(block, D - from);
    if (width < block) std::memset(memory, 0, rows * block * sizeof(T));
    for (int64_t row = 0; row < rows; ++row) pack(row, from, width, memory + row * block);
    PSF_DISPATCH(add_terms<T>(terms.data(), static_cast<int64_t>(terms.size()), memory, scale, out + from, D, width, fresh, mirror));
  });
}
template <class T> auto copied_rows(const T* in, int64_t D) {
  return [in, D](int64_t row, int64_t from, int64_t width, T* memory) { std::memcpy(memory, in + row * D + from, width * sizeof(T)); };
}

// tokens[to] += scale value (W[i, j] + W[j, i]) over the pairs i <= j of symmetric values, with one token; half on the diagonal.
template <class T>
void add_symmetric_products(std::vector<Term<T>>& terms, T scale, const T* W, int64_t N, int64_t C, T* tokens, int64_t D) {
  std::vector<std::array<int64_t, 2>> pair(pairs(N) * C);
  for (int64_t j = 0; j < N; ++j)
    for (int64_t i = 0; i <= j; ++i)
      for (int64_t c = 0; c < C; ++c) pair[(pairs(j) + i) * C + c] = {((i * N + j) * C + c) * D, ((j * N + i) * C + c) * D};
  size_t count = 0;
  for (const Term<T>& x : terms) {
    const int64_t i = x.from / C / N, j = x.from / C % N;
    if (i <= j) terms[count++] = {x.to, static_cast<int32_t>((pairs(j) + i) * C + x.from % C), i == j ? x.value / 2 : x.value};
  }
  terms.resize(count);
  const auto pack = [&](int64_t row, int64_t from, int64_t width, T* memory) {
    PSF_DISPATCH(add_rows<T>(W + pair[row][0] + from, W + pair[row][1] + from, width, memory));
  };
  add_products<T>(terms, scale, pack, pairs(N) * C, tokens, D, false);
}

}  // namespace

PatchedAxes::PatchedAxes(Arguments& in, int64_t axes, const Tensor& rank, const Tensor& order, const std::optional<Tensor>& t,
                         const std::optional<Tensor>& log_r, const std::optional<Tensor>& log_c, double tau, const Tensor& slots,
                         int64_t grid, const Tensor& weight, bool needs_t) {
  in.integers("rank", rank, {&B, &S, &N});
  in.integers("order", order, {&B, &S, &N});
  in.count("grid", grid, 1, std::numeric_limits<int32_t>::max() - N);  // places are counted in 32 bits
  P.size = (N + grid - 1) / grid;
  L.size = axes == 2 ? grid * grid : grid;
  k.size = axes;
  places.size = grid * P;
  offsets.size = B + 1;
  in.integers("slots", slots, {&places});
  if (axes == 2) {
    in.floats("weight", weight, {&D, &C, &P, &P});
  } else {
    in.floats("weight", weight, {&D, &C, &P});
  }
  in.soft(t, log_r, log_c, tau, {&B, &S, &N}, needs_t);
}

void PatchedAxes::check_items(Arguments& in, const Tensor& items, const Tensor& ptr) {
  in.integers("items", items, {&k, &M});
  in.integers("ptr", ptr, {&offsets});
}

Axis::Axis(const char* op, const Tensor& slots_in, int64_t grid, int64_t N) : grid(grid), patch(slots_in.size(0) / grid) {
  const Tensor slots = slots_in.contiguous();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t places = slots.size(0);
  for (int64_t p = 0; p < places; ++p)
    PSF_CHECK_VALUE(slot[p] >= -1 && slot[p] < N && (grid > 1 || slot[p] == p), op, ": slots must hold -1 to ", N - 1,
                      grid > 1 ? "" : ", 0 1 2 ... in one patch", ", got ", slot[p], " in place ", p);
  start.assign(N + 1, 0);
  for (int64_t p = 0; p < places; ++p)
    if (slot[p] >= 0) ++start[slot[p] + 1];
  for (int64_t j = 0; j < N; ++j) start[j + 1] += start[j];
  std::vector<int32_t> next(start.begin(), start.end() - 1);
  cell.resize(start[N]);
  offset.resize(start[N]);
  for (int64_t p = 0; p < places; ++p)
    if (slot[p] >= 0) {
      cell[next[slot[p]]] = static_cast<int32_t>(p / patch);
      offset[next[slot[p]]++] = static_cast<int32_t>(p % patch);
    }
}

Items::Items(const char* op, const char* name, const Tensor& items, const Tensor& ptr, const Tensor& rank, const Tensor& order)
    : k(items.size(0)), M(items.size(1)), B(rank.size(0)), S(rank.size(1)), N(rank.size(2)), op_(op), items_(items.contiguous()),
      ptr_(ptr.contiguous()), rank_(rank.contiguous()), order_(order.contiguous()) {
  const int64_t* offsets = ptr_.const_data_ptr<int64_t>();
  check_offsets(op, offsets, B, N);
  std::vector<int64_t> graph_of_node;
  for (int64_t b = 0; b < B; ++b) graph_of_node.insert(graph_of_node.end(), offsets[b + 1] - offsets[b], b);
  check_rows(op, "rank", rank_, [&](int64_t b) { return offsets[b + 1] - offsets[b]; }, [&](int64_t) { return N; });
  const int64_t* u = items_.const_data_ptr<int64_t>();
  graph_.resize(M);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t axis = 0; axis < k; ++axis)
      PSF_CHECK_VALUE(u[axis * M + m] >= 0 && u[axis * M + m] < offsets[B], op, ": ", name, " must hold node numbers 0 to ",
                        offsets[B] - 1, ", got ", u[axis * M + m], " in column ", m);
    graph_[m] = graph_of_node[u[m]];
    PSF_CHECK_VALUE(k == 1 || graph_of_node[u[M + m]] == graph_[m], op, ": ", name, " must join nodes of one graph, got column ", m,
                      " from graph ", graph_[m], " to graph ", graph_of_node[u[M + m]]);
  }
  sort_by(graph_.data(), M, B, begin_, sorted_);
}

void Items::sort_by_node() {
  const int64_t* offsets = ptr_.const_data_ptr<int64_t>();
  const auto nodes = [&](int64_t b) { return offsets[b + 1] - offsets[b]; };
  check_rows(op_, "order", order_, nodes, nodes);
  for (int64_t axis = 0; axis < k; ++axis)
    sort_by(items_.const_data_ptr<int64_t>() + axis * M, M, offsets[B], begin_of_[axis], by_[axis]);
}

SampleView Items::sample(int64_t b, int64_t s) const {
  const int64_t *offsets = ptr_.const_data_ptr<int64_t>(), *u = items_.const_data_ptr<int64_t>(), at = (b * S + s) * N;
  return {rank_.const_data_ptr<int64_t>() + at, order_.const_data_ptr<int64_t>() + at, offsets[b], offsets[b + 1] - offsets[b], u,
          k == 2 ? u + M : nullptr, sorted_.data() + begin_[b], begin_[b + 1] - begin_[b], begin_of_[0].data(), by_[0].data(),
          begin_of_[1].data(), by_[1].data()};
}

double Items::products() const {
  double sum = 0;
  for (int64_t b = 0; b < B; ++b) {
    const SampleView x = sample(b, 0);
    sum += static_cast<double>(k * x.nodes) * static_cast<double>(x.count);
  }
  return sum * static_cast<double>(S);
}

bool Items::symmetric(const Tensor& values) const {
  if (k != 2) return false;
  const int64_t C = values.size(1), *u = items_.const_data_ptr<int64_t>();
  return PSF_DISPATCH_FLOATING(values.scalar_type(), [&] {
    const scalar_t* a = values.const_data_ptr<scalar_t>();
    std::vector<scalar_t> matrix;
    for (int64_t b = 0; b < B; ++b) {
      const SampleView x = sample(b, 0);
      matrix.assign(x.nodes * x.nodes * C, scalar_t(0));
      for (int64_t m = 0; m < x.count; ++m) {
        const int64_t item = x.items[m], pair = (u[item] - x.first) * x.nodes + u[M + item] - x.first;
        for (int64_t c = 0; c < C; ++c) matrix[pair * C + c] += a[item * C + c];
      }
      for (int64_t i = 0; i < x.nodes; ++i)
        for (int64_t j = 0; j < i; ++j)
          for (int64_t c = 0; c < C; ++c)
            if (matrix[(i * x.nodes + j) * C + c] != matrix[(j * x.nodes + i) * C + c]) return false;
    }
    return true;
  });
}

Tensor weight_rows(const Tensor& weight) {
  const Tensor last = weight.dim() == 4 ? weight.permute({2, 3, 1, 0}) : weight.permute({2, 1, 0});
  return last.contiguous().flatten(0, -3);
}

Tensor weight_like(const Tensor& rows, const Tensor& weight) {
  const int64_t patch = weight.size(2);
  return weight.dim() == 4 ? rows.unflatten(0, {patch, patch}).permute({3, 2, 0, 1}) : rows.permute({2, 1, 0});
}

void scatter(const Items& items, const Axis& axis, const Tensor& values, double scale, const Tensor& W, const std::optional<Tensor>& bias,
             const Tensor& tokens) {
  const int64_t C = W.size(1), D = W.size(2), L = tokens.size(2), S = items.S, samples = items.B * S;
  PSF_DISPATCH_FLOATING(W.scalar_type(), [&] {
    using T = scalar_t;
    const T *a = values.const_data_ptr<T>(), *w = W.const_data_ptr<T>(), *begin = bias ? bias->const_data_ptr<T>() : nullptr;
    T* y = tokens.mutable_data_ptr<T>();
    const bool dense = is_dense(items, W.sizes(), L);
    parallel_for(0, samples, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T* sample = y + i * L * D;
        if (!begin) std::memset(sample, 0, L * D * sizeof(T));
        for (int64_t l = 0; begin && l < L; ++l) std::memcpy(sample + l * D, begin, D * sizeof(T));
        if (!dense) PSF_DISPATCH(scatter_sample<T>(axis, items.sample(i / S, i % S), a, C, T(scale), w, D, sample));
      }
    });
    if (!dense) return;
    std::vector<Term<T>> terms = terms_of<T>(items, axis, values, L);
    const int64_t rows = W.size(0) * C;
    if (fills(terms, samples * L, rows))
      addmm_(tokens.view({samples * L, D}), matrix_of<T>(terms, samples * L, rows, W.options()), W.view({rows, D}), 1, scale);
    else if (axis.grid == 1 && items.symmetric(values))
      add_symmetric_products<T>(terms, T(scale), w, items.N, C, y, D);
    else
      add_products<T>(terms, T(scale), copied_rows(w, D), rows, y, D, false);
  });
}

Tensor gather(const Items& items, const Axis& axis, const Tensor& tokens, double scale, const Tensor& W) {
  const int64_t C = W.size(1), D = W.size(2), L = tokens.size(2), S = items.S;
  const Tensor values = empty({items.M, C}, tokens.options());
  PSF_DISPATCH_FLOATING(W.scalar_type(), [&] {
    using T = scalar_t;
    const T *x = tokens.const_data_ptr<T>(), *w = W.const_data_ptr<T>();
    T* out = values.mutable_data_ptr<T>();
    parallel_for(0, items.M, grain(double(S) * double(C * D)), [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = items.graph(item);
        SampleView view = items.sample(b, 0);
        view.items = &item;
        view.count = 1;
        PSF_DISPATCH(gather_item<T>(axis, view, S, items.N, x + b * S * L * D, L, T(scale), w, C, D, out + item * C));
      }
    });
  });
  return values;
}

Tensor weight_gradient(const Items& items, const Axis& axis, const Tensor& values, double scale, const Tensor& tokens, IntArrayRef shape) {
  const Tensor dW = empty(shape, tokens.options());
  Tensor flat = dW.view({shape[0] * shape[1], shape[2]});
  const int64_t C = shape[1], D = shape[2], L = tokens.size(2), S = items.S, samples = items.B * S;
  PSF_DISPATCH_FLOATING(tokens.scalar_type(), [&] {
    using T = scalar_t;
    const T *a = values.const_data_ptr<T>(), *x = tokens.const_data_ptr<T>();
    T* out = dW.mutable_data_ptr<T>();
    // each thread has its own part of the width, so the order of the sums does not depend on the threads
    if (is_dense(items, shape, L)) {
      const int64_t rows = shape[0] * C;
      std::vector<Term<T>> terms = terms_of<T>(items, axis, values, L);
      if (fills(terms, samples * L, rows)) {
        const Tensor matrix = matrix_of<T>(terms, samples * L, rows, tokens.options());
        addmm_(flat, matrix.t(), tokens.view({samples * L, D}), 0, scale);
        return;
      }
      std::vector<int32_t> mirror;  // with one token the gradient of symmetric values is symmetric
      if (axis.grid == 1 && items.symmetric(values)) {
        mirror = transposed_rows(items.N, C);
        terms.erase(std::remove_if(terms.begin(), terms.end(), [&](const Term<T>& x) { return mirror[x.from] < x.from; }), terms.end());
      }
      terms = by_weight_row(terms, rows);
      std::vector<bool> used(rows);
      for (const Term<T>& term : terms) {
        used[term.to] = true;
        if (!mirror.empty()) used[mirror[term.to]] = true;
      }
      for (int64_t row = 0; row < rows; ++row)
        if (!used[row]) std::memset(out + row * D, 0, D * sizeof(T));
      return add_products<T>(terms, T(scale), copied_rows(x, D), samples * L, out, D, true, mirror.empty() ? nullptr : mirror.data());
    }
    parallel_for(0, shape[0] * C, 64, [&](int64_t first, int64_t last) { std::memset(out + first * D, 0, (last - first) * D * sizeof(T)); });
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t part = (D + line * get_num_threads() - 1) / (line * get_num_threads()) * line;
    parallel_for(0, (D + part - 1) / part, 1, [&](int64_t first, int64_t last) {
      for (int64_t from = first * part; from < std::min(last * part, D); from += part)
        for (int64_t i = 0; i < samples; ++i)
          PSF_DISPATCH(weight_gradient_sample<T>(axis, items.sample(i / S, i % S), a, C, T(scale), x + i * L * D + from, D, out + from,
                                                 std::min(part, D - from)));
    });
  });
  return dW;
}

// Sums of W (N, N, C, D) with its transpose, (pairs(n) C, D): row (pairs(j) + i) C + c is W[i, j, c] + W[j, i, c], i <= j < n.
static Tensor symmetric_rows(const Tensor& W, int64_t N, int64_t n) {
  const int64_t C = W.size(1), D = W.size(2);
  const Tensor out = empty({pairs(n) * C, D}, W.options());
  PSF_DISPATCH_FLOATING(W.scalar_type(), [&] {
    const scalar_t* w = W.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j)
        for (int64_t i = 0; i <= j; ++i)
          PSF_DISPATCH(add_rows<scalar_t>(w + (i * N + j) * C * D, w + (j * N + i) * C * D, C * D, y + (pairs(j) + i) * C * D));
    });
  });
  return out;
}

// One more than the last place of the first `slots` slots.
static int64_t last_place(const Axis& axis, int64_t slots) {
  int64_t last = 0;
  for (int32_t p = 0; p < axis.start[slots]; ++p) last = std::max<int64_t>(last, axis.offset[p] + 1);
  return last;
}

// The samples of x (samples, L, D) in that order.
template <class T> static Tensor samples_of(const Tensor& x, const std::vector<int64_t>& order) {
  const Tensor out = empty_like(x);
  const int64_t size = x.size(1) * x.size(2);
  parallel_for(0, static_cast<int64_t>(order.size()), grain(double(size)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(out.mutable_data_ptr<T>() + i * size, x.const_data_ptr<T>() + order[i] * size, size * sizeof(T));
  });
  return out;
}

std::array<Tensor, 3> permutation_gradient(Items& items, const Axis& axis, const Tensor& values, double scale, const Tensor& tokens,
                                           const Tensor& W, const Tensor& t_in, const Tensor& log_r_in, const Tensor& log_c_in, double tau) {
  items.sort_by_node();
  const Tensor t = t_in.contiguous(), log_r = log_r_in.contiguous(), log_c = log_c_in.contiguous();
  const std::array<Tensor, 3> out{zeros_like(t), zeros_like(t), zeros_like(t)};
  const int64_t C = W.size(1), D = W.size(2), L = tokens.size(2), S = items.S, N = items.N, samples = items.B * S, width = W.size(0) * C;
  // If most products are needed, a GEMM over a few samples computes all of them.
  const bool gemm = static_cast<double>(samples) * static_cast<double>(L * width) < gemm_gain * items.products();
  PSF_DISPATCH_FLOATING(W.scalar_type(), [&] {
    using T = scalar_t;
    const T *a = values.const_data_ptr<T>(), *x = tokens.const_data_ptr<T>();
    const int64_t tile = gemm ? std::clamp<int64_t>(gemm_bytes / (L * width * static_cast<int64_t>(sizeof(T))), 1, std::max<int64_t>(1, samples)) : samples;
    const Tensor flat = tokens.flatten(0, 1);
    // with one token the first offset is the first slot: samples with few nodes need only the first offsets
    std::vector<int64_t> sorted(samples);
    std::iota(sorted.begin(), sorted.end(), 0);
    const bool one_token = gemm && axis.grid == 1;
    if (one_token) std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t i, int64_t j) { return items.nodes(i / S) < items.nodes(j / S); });
    const Tensor picked = one_token ? samples_of<T>(flat, sorted) : flat;
    // with one token every slot is a place: a symmetric graph's gradient needs only products with W + W^T, one per pair
    const bool symmetric = one_token && samples > 0 && items.symmetric(values);
    const Tensor rows = symmetric ? symmetric_rows(W, N, items.nodes(sorted.back() / S)) : W.flatten(0, 1);
    const int64_t mixed = axis.patch * D, scratch = soft_scratch(N) + (gemm ? 0 : mixed);
    for (int64_t begin = 0; begin < samples; begin += tile) {
      const int64_t count = std::min(tile, samples - begin);
      const int64_t most = one_token ? items.nodes(sorted[begin + count - 1] / S) : 0;
      const int64_t wide = symmetric ? pairs(most) * C : one_token ? last_place(axis, most) * (width / axis.patch) : width;
      Tensor Z = gemm ? product(picked.narrow(0, begin, count).flatten(0, 1), rows.narrow(0, 0, wide)) : Tensor();
      if (one_token && items.k == 1) Z = Z.view({count, wide / C, C}).transpose(1, 2).contiguous();
      const T* z = gemm ? Z.const_data_ptr<T>() : nullptr;
      const int64_t parts = std::min<int64_t>(count, 8 * get_num_threads());
      for_each_group<T>(parts, scratch, [&](int64_t part, T* memory) {
        for (int64_t m = part * count / parts; m < (part + 1) * count / parts; ++m) {
          const int64_t i = sorted[begin + m], at = i * N;
          const Soft<T> soft{t.const_data_ptr<T>() + at, log_r.const_data_ptr<T>() + at, log_c.const_data_ptr<T>() + at,
                             {out[0].mutable_data_ptr<T>() + at, out[1].mutable_data_ptr<T>() + at, out[2].mutable_data_ptr<T>() + at},
                             T(1) / T(tau)};
          const T* sample_z = z ? z + m * L * wide : nullptr;
          PSF_DISPATCH(permutation_gradient_sample<T>({axis, x + i * L * D, W.const_data_ptr<T>(), sample_z, one_token, symmetric, C, D, wide, memory + soft_scratch(N)},
                                                      items.sample(i / S, i % S), a, T(scale), soft, memory));
        }
      });
    }
  });
  return out;
}

}  // namespace psf
