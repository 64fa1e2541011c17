// readout and its gradient on the CPU: the sums of items.h with the roles of `embed` swapped.
#include "../kernels.h"
#include "items.h"

namespace psf {
namespace {

using Maybe = std::optional<Tensor>;

Items items_of(const Tensor& items, const Tensor& ptr, const Tensor& rank, const Tensor& order) {
  return Items("readout", "at", items, ptr, rank, order);
}

Tensor readout(const Tensor& tokens, const Tensor& items_in, const Tensor& ptr, const Tensor& rank, const Tensor& order, const Maybe& t,
               const Maybe& log_r, const Maybe& log_c, double tau, const Tensor& slots, int64_t, int64_t grid, const Tensor& weight, const Maybe& bias) {
  Arguments in("readout");
  PatchedAxes x(in, axes_of(weight), rank, order, t, log_r, log_c, tau, slots, grid, weight);
  x.check_items(in, items_in, ptr);
  in.floats("tokens", tokens, {&x.B, &x.S, &x.L, &x.D});
  in.floats("bias", bias, {&x.C});
  const Items items = items_of(items_in, ptr, rank, order);
  const Axis axis(in.op, slots, grid, items.N);
  const Tensor values = gather(items, axis, tokens.contiguous(), 1.0 / static_cast<double>(items.S), weight_rows(weight));
  if (bias) PSF_DISPATCH_FLOATING(values.scalar_type(), [&] {
    const Tensor added = bias->contiguous();
    const scalar_t* b = added.const_data_ptr<scalar_t>();
    scalar_t* v = values.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < values.numel(); ++i) v[i] += b[i % values.size(1)];
  });
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> readout_backward(
    const Tensor& d_values_in, const Tensor& tokens_in, const Tensor& items_in, const Tensor& ptr, const Tensor& rank, const Tensor& order,
    const Maybe& t, const Maybe& log_r, const Maybe& log_c, double tau, const Tensor& slots, int64_t, int64_t grid, const Tensor& weight,
    bool needs_tokens, bool needs_t, bool needs_weight, bool needs_bias) {
  Arguments in("readout_backward");
  PatchedAxes x(in, axes_of(weight), rank, order, t, log_r, log_c, tau, slots, grid, weight, needs_t);
  x.check_items(in, items_in, ptr);
  in.floats("tokens", tokens_in, {&x.B, &x.S, &x.L, &x.D});
  in.floats("d_values", d_values_in, {&x.M, &x.C});
  Items items = items_of(items_in, ptr, rank, order);
  const Axis axis(in.op, slots, grid, items.N);
  const Tensor d_values = d_values_in.contiguous(), tokens = tokens_in.contiguous(), W = weight_rows(weight);
  const double scale = 1.0 / static_cast<double>(items.S);
  Tensor d_tokens, d_weight, d_bias;
  std::array<Tensor, 3> d_soft;
  if (needs_tokens) {
    d_tokens = empty_like(tokens);
    scatter(items, axis, d_values, scale, W, std::nullopt, d_tokens);
  }
  if (needs_t) d_soft = permutation_gradient(items, axis, d_values, scale, tokens, W, *t, *log_r, *log_c, tau);
  if (needs_weight) d_weight = weight_like(weight_gradient(items, axis, d_values, scale, tokens, W.sizes()), weight);
  if (needs_bias) d_bias = sum(d_values, {0});
  return {d_tokens, d_soft[0], d_soft[1], d_soft[2], d_weight, d_bias};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&readout>("readout");
  m.add<&readout_backward>("readout_backward");
}

}  // namespace psf
