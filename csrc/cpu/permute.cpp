// permute and its gradient on the CPU.
#include "../kernels.h"
#include "items.h"
#include "permute.h"
#include "rows.h"
#define PSF_KERNEL "permute.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

using Maybe = std::optional<Tensor>;

// The axes of a call. `shared`: x has one sample, which all permutations of its graph move.
struct Axes {
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots}, D{"D"}, of_x{"1 or S"};
  bool shared;
  Axes(Arguments& in, const Tensor& x, const Tensor& rank, const Tensor& order, const Maybe& t, const Maybe& log_r, const Maybe& log_c,
       double tau, bool needs_t = false) {
    in.integers("rank", rank, {&B, &S, &N});
    in.integers("order", order, {&B, &S, &N});
    in.floats("x", x, {&B, &of_x, &N, &D});
    PSF_CHECK_VALUE(of_x == 1 || of_x == S, in.op, ": x must have 1 or S = ", S.size, " samples, got ", of_x.size);
    in.soft(t, log_r, log_c, tau, {&B, &S, &N}, needs_t);
    shared = of_x == 1 && S != 1;
  }
};

// y[j] = x[from[j]], rows of D.
template <class T> void take_rows(const T* x, const int64_t* from, int64_t N, int64_t D, T* y) {
  if (D == 1) {
    for (int64_t j = 0; j < N; ++j) y[j] = x[from[j]];
  } else {
    for (int64_t j = 0; j < N; ++j) std::copy_n(x + from[j] * D, D, y + j * D);
  }
}

// y[b, s, j] = x[b, s, order[j]] if `inverse`, else x[b, s, rank[j]].
Tensor permute(const Tensor& x_in, const Tensor& rank_in, const Tensor& order_in, const Maybe& num_nodes, const Maybe& t,
               const Maybe& log_r, const Maybe& log_c, double tau, bool inverse) {
  Arguments in("permute");
  Axes axes(in, x_in, rank_in, order_in, t, log_r, log_c, tau);
  NumNodes(in, num_nodes, axes.B, axes.N);
  const Tensor x = x_in.contiguous(), index = (inverse ? order_in : rank_in).contiguous();
  const int64_t *from = index.const_data_ptr<int64_t>(), S = axes.S, N = axes.N, D = axes.D;
  const Tensor y = empty({axes.B, S, N, D}, x.options());
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const T* given = x.const_data_ptr<T>();
    T* moved = y.mutable_data_ptr<T>();
    parallel_for(0, axes.B * S, grain(N * D), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        check_row(in.op, inverse ? "order" : "rank", from + i * N, N, N, i / S);
        take_rows(given + (axes.shared ? i / S : i) * N * D, from + i * N, N, D, moved + i * N * D);
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> permute_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& rank_in,
                                                            const Tensor& order_in, const Maybe& num_nodes, const Maybe& t_in, const Maybe& log_r_in,
                                                            const Maybe& log_c_in, double tau, bool inverse, bool needs_x, bool needs_t) {
  Arguments in("permute_backward");
  Axes axes(in, x_in, rank_in, order_in, t_in, log_r_in, log_c_in, tau, needs_t);
  const Tensor d_y = in.floats("d_y", d_y_in, {&axes.B, &axes.S, &axes.N, &axes.D}).contiguous();
  const NumNodes counts(in, num_nodes, axes.B, axes.N);
  const Tensor x = x_in.contiguous(), order = order_in.contiguous(), back = (inverse ? rank_in : order_in).contiguous();
  const int64_t B = axes.B, S = axes.S, N = axes.N, D = axes.D;
  Tensor d_x;
  std::array<Tensor, 3> soft, d_soft;
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const T* d = d_y.const_data_ptr<T>();
    if (needs_x) {
      const int64_t *from = back.const_data_ptr<int64_t>(), samples = axes.shared ? S : 1;  // that one sample of x sums
      d_x = axes.shared ? zeros_like(x) : empty({B, S, N, D}, x.options());
      T* sum = d_x.mutable_data_ptr<T>();
      parallel_for(0, B * S / std::max<int64_t>(samples, 1), grain(samples * N * D), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * samples; i < end * samples; ++i) {
          const int64_t* at = from + i * N;
          check_row(in.op, inverse ? "rank" : "order", at, N, N, i / S);
          if (axes.shared) {
            for (int64_t j = 0; j < N; ++j) PSF_DISPATCH(add_row<T>(sum + (i / samples * N + j) * D, d + (i * N + at[j]) * D, D));
          } else {
            take_rows(d + i * N * D, at, N, D, sum + i * N * D);
          }
        }
      });
    }
    if (needs_t) {
      const int64_t* orders = order.const_data_ptr<int64_t>();
      soft = {t_in->contiguous(), log_r_in->contiguous(), log_c_in->contiguous()};
      for (Tensor& one : d_soft) one = D < few_numbers ? empty_like(soft[0]) : zeros_like(soft[0]);
      const T* given = x.const_data_ptr<T>();
      const auto rows = [&](int64_t i) {  // a and b of a sample
        const T *in_sample = given + (axes.shared ? i / S : i) * N * D, *out_sample = d + i * N * D;
        check_row(in.op, "order", orders + i * N, N, N, i / S);
        return std::pair<MovedRows<T>, MovedRows<T>>({inverse ? in_sample : out_sample, orders + i * N}, {inverse ? out_sample : in_sample, nullptr});
      };
      const auto of_sample = [&](int64_t i) {
        const int64_t at = i * N;
        return Soft<T>{soft[0].const_data_ptr<T>() + at, soft[1].const_data_ptr<T>() + at, soft[2].const_data_ptr<T>() + at,
                       {d_soft[0].mutable_data_ptr<T>() + at, d_soft[1].mutable_data_ptr<T>() + at, d_soft[2].mutable_data_ptr<T>() + at},
                       T(1) / T(tau)};
      };
      if (D < few_numbers) {
        for_each_tile<T>(B, S, N, counts, [](int64_t slots) { return baseline::permute_tile_scratch(slots); }, [&](const Tile<T>& tile, int64_t first, T* scratch) {
          MovedRows<T> a[Tile<T>::most_lanes], b[Tile<T>::most_lanes];
          for (int row = 0; row < tile.rows; ++row) std::tie(a[row], b[row]) = rows(first + row);
          PSF_DISPATCH(permute_gradient_lanes<T>(tile, a, b, D, of_sample(first), scratch));
        });
      } else {
        const int64_t width = D + 16;  // with vectors of up to 16
        parallel_for(0, B * S, grain(20 * N * D), [&](int64_t begin, int64_t end) {
          T* scratch = scratch_memory<T>(3 * (N + 16) + 2 * (N + 1) * width);
          for (int64_t i = begin; i < end; ++i) {
            const auto [a, b] = rows(i);
            PSF_DISPATCH(permute_gradient<T>(a, b, counts ? counts[i / S] : N, D, of_sample(i), scratch));
          }
        });
      }
    }
  });
  return {d_x, d_soft[0], d_soft[1], d_soft[2]};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&permute>("permute");
  m.add<&permute_backward>("permute_backward");
}

}  // namespace psf
