// embed_matrix and its gradient on the CPU: gathers around the library's matrix products. Tokens without a valid slot are
// not computed.
#include "../kernels.h"
#include "items.h"

#include "product.h"
#include "rows.h"
#define PSF_KERNEL "embed_matrix.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using Maybe = std::optional<Tensor>;

constexpr int64_t tile_bytes = 32 << 20;  // of patch matrices at a time

// The samples in order, and the tokens of each that hold valid slots.
struct Tiles {
  int64_t B, S, N, C, D, grid, patch, width;
  const int64_t *order, *slots;
  Tensor order_, slots_;
  std::vector<int64_t> nodes;                // of each graph
  std::vector<std::vector<int32_t>> cells;   // of each graph: (cell, cell') of its tokens
  std::vector<int64_t> first;                // row of a sample's first token, over all samples

  // The arguments are checked, except num_nodes and the values.
  Tiles(Arguments& in, Dim& graphs, const Maybe& num_nodes, const Tensor& order_in, const Tensor& slots_in, int64_t grid, const Tensor& W)
      : B(order_in.size(0)), S(order_in.size(1)), N(order_in.size(2)), C(W.size(1)), D(W.size(2)), grid(grid),
        patch(slots_in.size(0) / grid), width(W.size(0) * W.size(1)), order_(order_in.contiguous()), slots_(slots_in.contiguous()) {
    order = order_.const_data_ptr<int64_t>();
    slots = slots_.const_data_ptr<int64_t>();
    const NumNodes counts(in, num_nodes, graphs, N);
    first.push_back(0);
    for (int64_t b = 0; b < B; ++b) {
      nodes.push_back(counts ? counts[b] : N);
      std::vector<int32_t> used, pairs;
      for (int64_t cell = 0; cell < grid; ++cell)
        for (int64_t o = 0; o < patch; ++o)
          if (const int64_t slot = slots[cell * patch + o]; slot >= 0 && slot < nodes[b]) {
            used.push_back(static_cast<int32_t>(cell));
            break;
          }
      pairs.reserve(2 * used.size() * used.size());  // fails at once if there are too many
      for (const int32_t i : used)
        for (const int32_t j : used) pairs.insert(pairs.end(), {i, j});
      for (int64_t s = 0; s < S; ++s) first.push_back(first.back() + static_cast<int64_t>(pairs.size() / 2));
      cells.push_back(std::move(pairs));
    }
    check_rows("embed_matrix", "order", order_, [&](int64_t b) { return nodes[b]; }, [&](int64_t) { return N; });
  }
  int64_t samples() const { return B * S; }
  int64_t rows(int64_t sample) const { return first[sample + 1] - first[sample]; }

  // f(first sample, samples), for as many as fit the tile.
  template <class F> void for_each_tile(F f) const {
    for (int64_t begin = 0; begin < samples();) {
      int64_t end = begin + 1;
      while (end < samples() && (first[end + 1] - first[begin]) * width * 4 <= tile_bytes) ++end;
      f(begin, end);
      begin = end;
    }
  }

  template <class T> Tensor patches(const Tensor& matrix, int64_t begin, int64_t end) const {
    const Tensor out = empty({first[end] - first[begin], width}, matrix.options());
    const T* A = matrix.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t b = i / S;
        PSF_DISPATCH(gather_patches<T>(A + b * N * N * C, order + i * N, nodes[b], N, C, slots, patch, cells[b].data(), rows(i),
                                       y + (first[i] - first[begin]) * width));
      }
    });
    return out;
  }

  // f(row among the tile's compact rows, row among all tokens) for every token of the samples.
  template <class F> void for_each_token(int64_t begin, int64_t end, F f) const {
    parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        for (int64_t r = 0; r < rows(i); ++r)
          f(first[i] - first[begin] + r, i * grid * grid + cells[i / S][2 * r] * grid + cells[i / S][2 * r + 1]);
    });
  }

  template <class T> Tensor compact(const Tensor& tokens, int64_t begin, int64_t end) const {
    const Tensor out = empty({first[end] - first[begin], D}, tokens.options());
    const T* x = tokens.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    for_each_token(begin, end, [&](int64_t row, int64_t token) { std::memcpy(y + row * D, x + token * D, D * sizeof(T)); });
    return out;
  }
};

Tensor embed_matrix(const Tensor& matrix_in, const Maybe& num_nodes, const Tensor& rank, const Tensor& order, const Maybe& t,
                    const Maybe& log_r, const Maybe& log_c, double tau, const Tensor& slots, int64_t, int64_t grid, const Tensor& weight,
                    const Maybe& bias_in) {
  Arguments in("embed_matrix");
  PatchedAxes axes(in, 2, rank, order, t, log_r, log_c, tau, slots, grid, weight);
  in.floats("matrix", matrix_in, {&axes.B, &axes.N, &axes.N, &axes.C});
  const Tensor given = in.floats("bias", bias_in, {&axes.D});
  const Tensor matrix = matrix_in.contiguous(), W = weight_rows(weight), flat_t = W.flatten(0, 1).t().contiguous();
  const Tiles x(in, axes.B, num_nodes, order, slots, grid, W);
  const Tensor bias = given.defined() ? given : zeros({x.D}, W.options());
  const Tensor tokens = empty({x.B, x.S, grid * grid, x.D}, W.options());
  fill_rows(tokens, bias);
  PSF_DISPATCH_FLOATING(W.scalar_type(), [&] {
    using T = scalar_t;
    x.for_each_tile([&](int64_t begin, int64_t end) {
      const Tensor out = product(x.patches<T>(matrix, begin, end), flat_t, bias);
      const T* from = out.const_data_ptr<T>();
      T* to = tokens.mutable_data_ptr<T>();
      x.for_each_token(begin, end, [&](int64_t row, int64_t token) { std::memcpy(to + token * x.D, from + row * x.D, x.D * sizeof(T)); });
    });
  });
  return tokens;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> embed_matrix_backward(
    const Tensor& d_tokens_in, const Tensor& matrix_in, const Maybe& num_nodes, const Tensor& rank, const Tensor& order, const Maybe& t_in,
    const Maybe& log_r_in, const Maybe& log_c_in, double tau, const Tensor& slots, int64_t, int64_t grid, const Tensor& weight, bool needs_matrix,
    bool needs_t, bool needs_weight, bool needs_bias) {
  Arguments in("embed_matrix_backward");
  PatchedAxes axes(in, 2, rank, order, t_in, log_r_in, log_c_in, tau, slots, grid, weight, needs_t);
  in.floats("matrix", matrix_in, {&axes.B, &axes.N, &axes.N, &axes.C});
  in.floats("d_tokens", d_tokens_in, {&axes.B, &axes.S, &axes.L, &axes.D});
  const Tensor d_tokens = d_tokens_in.contiguous(), matrix = matrix_in.contiguous(), W = weight_rows(weight), flat = W.flatten(0, 1);
  const Tiles x(in, axes.B, num_nodes, order, slots, grid, W);
  Tensor d_matrix, d_flat, d_bias;
  std::array<Tensor, 3> d_soft, soft;
  if (needs_matrix) d_matrix = zeros_like(matrix);
  if (needs_t) {
    soft = {t_in->contiguous(), log_r_in->contiguous(), log_c_in->contiguous()};
    for (Tensor& d : d_soft) d = zeros_like(soft[0]);
  }
  if (needs_weight) d_flat = zeros_like(flat);
  if (needs_bias) d_bias = sum(d_tokens, {0, 1, 2});
  PSF_DISPATCH_FLOATING(W.scalar_type(), [&] {
    using T = scalar_t;
    const T* A = matrix.const_data_ptr<T>();
    x.for_each_tile([&](int64_t begin, int64_t end) {
      const Tensor d_out = x.compact<T>(d_tokens, begin, end);
      if (needs_weight) addmm_(d_flat, x.patches<T>(matrix, begin, end).t(), d_out);
      if (!needs_matrix && !needs_t) return;
      const Tensor d_patches = product(d_out, flat);
      const T* d = d_patches.const_data_ptr<T>();
      // one thread per graph, so that the sums of d_matrix over samples keep their order
      parallel_for(begin / x.S, (end - 1) / x.S + 1, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = std::max(begin, from * x.S); i < std::min(end, to * x.S); ++i) {
          const int64_t b = i / x.S, n = x.nodes[b], at = i * x.N;
          const T* Ab = A + b * x.N * x.N * x.C;
          const Tensor dA = zeros({n * n * x.C}, matrix.options());
          T* dA_pointer = dA.mutable_data_ptr<T>();
          PSF_DISPATCH(scatter_patches<T>(d + (x.first[i] - x.first[begin]) * x.width, n, x.C, x.slots, x.patch, x.cells[b].data(), x.rows(i),
                                          dA_pointer));
          if (needs_matrix) PSF_DISPATCH(add_matrix<T>(dA_pointer, x.order + at, n, x.N, x.C, d_matrix.mutable_data_ptr<T>() + b * x.N * x.N * x.C));
          if (!needs_t) continue;
          const Tensor left = empty({n, 2 * n * x.C}, matrix.options()), right = empty_like(left);
          PSF_DISPATCH(gradient_factors<T>(Ab, dA_pointer, x.order + at, n, x.N, x.C, left.mutable_data_ptr<T>(), right.mutable_data_ptr<T>()));
          const Tensor G = mm(left, right.t());
          const Soft<T> p{soft[0].const_data_ptr<T>() + at, soft[1].const_data_ptr<T>() + at, soft[2].const_data_ptr<T>() + at,
                          {d_soft[0].mutable_data_ptr<T>() + at, d_soft[1].mutable_data_ptr<T>() + at, d_soft[2].mutable_data_ptr<T>() + at},
                          T(1) / T(tau)};
          T* scratch = scratch_memory<T>(soft_scratch(x.N));
          PSF_DISPATCH(reduce_matrix<T>(G.const_data_ptr<T>(), n, p, scratch));
        }
      });
    });
  });
  return {d_matrix, d_soft[0], d_soft[1], d_soft[2], needs_weight ? weight_like(d_flat.unflatten(0, {W.size(0), W.size(1)}), weight) : Tensor(), d_bias};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&embed_matrix>("embed_matrix");
  m.add<&embed_matrix_backward>("embed_matrix_backward");
}

}  // namespace psf
