// soft_permutation and its gradient on the CPU: what is computed stands in soft_permutation.kernel.h.
#include "rows.h"
#define PSF_KERNEL "soft_permutation.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor or_zeros(const OptionalTensor& x, const Tensor& like) { return x ? x->contiguous() : at::zeros_like(like); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_permutation(const Tensor& scores_in, const OptionalTensor& num_nodes,
                                                                    double tau, int64_t iterations, bool normalize) {
  const Tensor scores = scores_in.contiguous();
  const int64_t B = scores.size(0), S = scores.size(1), N = scores.size(2);
  const int64_t* counts = num_nodes_pointer("soft_permutation", num_nodes, B, N);
  const Tensor order = at::empty({B, S, N}, scores.options().dtype(at::kLong)), rank = at::empty_like(order);
  const Tensor t = at::empty_like(scores), log_r = at::empty_like(scores), log_c = at::empty_like(scores);
  std::atomic<bool> finite{true};
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "soft_permutation", [&] {
    using T = scalar_t;
    for_each_tile<T>(
        B, S, N, counts, [](int64_t slots) { return baseline::soft_permutation_scratch(slots); },
        [&](const Tile<T>& tile, int64_t first, T* scratch) {
          const int64_t at = first * N;
          bool ok = true;
          PSF_DISPATCH(soft_permutation_lanes<T>(
              tile, scores.const_data_ptr<T>() + at, static_cast<T>(tau), static_cast<int>(iterations), normalize, scratch,
              order.mutable_data_ptr<int64_t>() + at, rank.mutable_data_ptr<int64_t>() + at, t.mutable_data_ptr<T>() + at,
              log_r.mutable_data_ptr<T>() + at, log_c.mutable_data_ptr<T>() + at, &ok));
          if (!ok) finite = false;
        });
  });
  TORCH_CHECK_VALUE(finite, "soft_permutation: scores must be finite, got NaN or infinity among the valid nodes");
  return {t, log_r, log_c, order, rank};
}

Tensor soft_permutation_backward(const OptionalTensor& d_t_in, const OptionalTensor& d_log_r_in, const OptionalTensor& d_log_c_in,
                                 const Tensor& scores_in, const Tensor& order, const Tensor& t, const OptionalTensor& num_nodes,
                                 double tau, int64_t iterations, bool normalize) {
  const Tensor d_t = or_zeros(d_t_in, t), d_log_r = or_zeros(d_log_r_in, t), d_log_c = or_zeros(d_log_c_in, t);
  const Tensor scores = scores_in.contiguous(), d_scores = at::empty_like(scores);
  const int64_t B = scores.size(0), S = scores.size(1), N = scores.size(2);
  const int64_t* counts = num_nodes_pointer("soft_permutation", num_nodes, B, N);
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "soft_permutation_backward", [&] {
    using T = scalar_t;
    const int steps = static_cast<int>(iterations);
    for_each_tile<T>(
        B, S, N, counts, [&](int64_t slots) { return baseline::soft_permutation_backward_scratch(slots, steps); },
        [&](const Tile<T>& tile, int64_t first, T* scratch) {
          const int64_t at = first * N;
          PSF_DISPATCH(soft_permutation_backward_lanes<T>(
              tile, d_t.const_data_ptr<T>() + at, d_log_r.const_data_ptr<T>() + at, d_log_c.const_data_ptr<T>() + at,
              scores.const_data_ptr<T>() + at, order.const_data_ptr<int64_t>() + at, t.const_data_ptr<T>() + at,
              static_cast<T>(tau), steps, normalize, scratch, d_scores.mutable_data_ptr<T>() + at));
        });
  });
  return d_scores;
}

}  // namespace

TORCH_LIBRARY_IMPL(probsym_fast, CPU, m) {
  m.impl("soft_permutation", &soft_permutation);
  m.impl("soft_permutation_backward", &soft_permutation_backward);
}

}  // namespace psf
