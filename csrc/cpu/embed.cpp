// embed and its gradient on the CPU: the sums of items.h.
#include "../kernels.h"
#include "items.h"

namespace psf {
namespace {

using Maybe = std::optional<Tensor>;

Items items_of(const Tensor& items, const Tensor& ptr, const Tensor& rank, const Tensor& order) {
  return items.size(0) == 2 ? Items("embed_edges", "edge_index", items, ptr, rank, order) : Items("embed_nodes", "x", items, ptr, rank, order);
}

Tensor embed(const Tensor& items_in, const Tensor& values, const Tensor& ptr, const Tensor& rank, const Tensor& order, const Maybe& t,
             const Maybe& log_r, const Maybe& log_c, double tau, const Tensor& slots, int64_t, int64_t grid, const Tensor& weight, const Maybe& bias) {
  Arguments in("embed");
  PatchedAxes x(in, axes_of(weight), rank, order, t, log_r, log_c, tau, slots, grid, weight);
  x.check_items(in, items_in, ptr);
  in.floats("values", values, {&x.M, &x.C});
  in.floats("bias", bias, {&x.D});
  const Items items = items_of(items_in, ptr, rank, order);
  const Axis axis(in.op, slots, grid, items.N);
  const Tensor tokens = empty({items.B, items.S, items.k == 2 ? grid * grid : grid, weight.size(0)}, weight.options());
  scatter(items, axis, values.contiguous(), 1, weight_rows(weight), bias ? Maybe(bias->contiguous()) : Maybe(), tokens);
  return tokens;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> embed_backward(
    const Tensor& d_tokens_in, const Tensor& items_in, const Tensor& values_in, const Tensor& ptr, const Tensor& rank, const Tensor& order,
    const Maybe& t, const Maybe& log_r, const Maybe& log_c, double tau, const Tensor& slots, int64_t, int64_t grid, const Tensor& weight,
    bool needs_values, bool needs_t, bool needs_weight, bool needs_bias) {
  Arguments in("embed_backward");
  PatchedAxes x(in, axes_of(weight), rank, order, t, log_r, log_c, tau, slots, grid, weight, needs_t);
  x.check_items(in, items_in, ptr);
  in.floats("values", values_in, {&x.M, &x.C});
  in.floats("d_tokens", d_tokens_in, {&x.B, &x.S, &x.L, &x.D});
  Items items = items_of(items_in, ptr, rank, order);
  const Axis axis(in.op, slots, grid, items.N);
  const Tensor d_tokens = d_tokens_in.contiguous(), values = values_in.contiguous(), W = weight_rows(weight);
  Tensor d_values, d_weight, d_bias;
  std::array<Tensor, 3> d_soft;
  if (needs_values) d_values = gather(items, axis, d_tokens, 1, W);
  if (needs_t) d_soft = permutation_gradient(items, axis, values, 1, d_tokens, W, *t, *log_r, *log_c, tau);
  if (needs_weight) d_weight = weight_like(weight_gradient(items, axis, values, 1, d_tokens, W.sizes()), weight);
  if (needs_bias) d_bias = sum(d_tokens, {0, 1, 2});
  return {d_values, d_soft[0], d_soft[1], d_soft[2], d_weight, d_bias};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&embed>("embed");
  m.add<&embed_backward>("embed_backward");
}

}  // namespace psf
