// mlp and its gradient on the CPU: a tile of rows goes through all layers while it is in the caches.
#include "../kernels.h"
#include "mlp.h"
#define PSF_KERNEL "mlp.kernel.h"
#include "each_isa.h"

namespace psf {
namespace {

// The checked arguments of a call.
struct Call {
  Arguments in;
  Dim M{"M"}, E;
  std::optional<MlpParts> parts;

  Call(const char* op, const Tensor& x, const Tensor& weights, const Integers& widths, int64_t activation, bool first, bool last)
      : in(op), E{"widths[0]", checked(op, widths), widths.front()} {
    in.floats("x", x, {&M, &E});
    in.count("activation", activation, 0, 3);
    parts.emplace(widths, activation, first, last);
    Dim P{"weights", parts->weights, parts->weights};
    in.floats("weights", weights, {&P});
  }
  static int64_t checked(const char* op, const Integers& widths) {
    PSF_CHECK_VALUE(widths.size() >= 2 && widths.size() <= 1025, op, ": widths must be 2 to 1025, got ", widths.size());
    for (const int64_t width : widths) PSF_CHECK_VALUE(width >= 1 && width <= 4096, op, ": widths must be 1 to 4096 each, got ", width);
    return widths.front();
  }
  const MlpSizes& sizes() const { return parts->sizes; }
  int64_t sequences() const { return (M + mlp_rows - 1) / mlp_rows; }
  int64_t values_kept() const { return mlp_rows * sizes().kept; }
  Tiles tiles() const {
    if (M % mlp_rows == 0) return Tiles(sequences(), mlp_rows);
    std::vector<int64_t> rows(sequences(), mlp_rows);
    rows.back() = M % mlp_rows;
    return Tiles(sequences(), mlp_rows, rows.data());
  }
  template <class T> MlpCall<T> packed(const Tensor& weights, const Tensor& memory, bool back, bool bf16) const {
    const MlpCall<T> call{sizes(), parts->layers.data(), {weights.const_data_ptr<T>(), memory.mutable_data_ptr<T>(), takes_bf16<T>(bf16)}};
    PSF_DISPATCH(pack_mlp<T>(call, back));
    return call;
  }
  template <class T> int64_t scratch(bool back) const {
    int64_t count = 0;
    PSF_DISPATCH(mlp_scratch<T>(sizes(), back, count));
    return count;
  }
};

std::tuple<Tensor, Tensor> mlp(const Tensor& x_in, const Tensor& weights_in, const Integers& widths, int64_t activation, bool first, bool last, bool keep, bool allow_bf16) {
  const Call given("mlp", x_in, weights_in, widths, activation, first, last);
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous(), memory = empty({given.parts->packed}, x.options());
  const Tensor y = empty({given.M, given.sizes().out}, x.options());
  const Tensor kept = empty({keep ? kept_rows(given.sequences()) : 0, given.values_kept()}, x.options());
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const MlpCall<T> call = given.packed<T>(weights, memory, false, allow_bf16);
    const T* from = x.const_data_ptr<T>();
    T *to = y.mutable_data_ptr<T>(), *states = kept.numel() ? kept.mutable_data_ptr<T>() : nullptr;
    mark_lanes<T>(kept, given.sequences());
    for_each_sequence_tile<T>(given.tiles(), given.scratch<T>(false), [&](const Sequences<T>& some, int64_t number, T* scratch) {
      T* const own = states ? states + number * lane_count<T>() * given.values_kept() : nullptr;
      PSF_DISPATCH(mlp_tile<T>(call, some, from, to, own, scratch));
    });
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor> mlp_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& weights_in, const Tensor& kept_in, const Integers& widths,
                                        int64_t activation, bool first, bool last, bool needs_x, bool needs_weights, bool allow_bf16) {
  Call given("mlp_backward", x_in, weights_in, widths, activation, first, last);
  const int64_t values = given.values_kept(), all = kept_rows(given.sequences()), out = given.sizes().out;
  Dim features{"out", out, out}, each{"values", values, values}, rows{"rows of kept"};
  const Tensor d_y = given.in.floats("d_y", d_y_in, {&given.M, &features}).contiguous(), kept = given.in.floats("kept", kept_in, {&rows, &each}).contiguous();
  PSF_CHECK_VALUE(rows == 0 || rows == all, "mlp_backward: kept must have 0 or ", all, " rows, got ", int64_t(rows));
  const Tensor x = x_in.contiguous(), weights = weights_in.contiguous(), memory = empty({given.parts->packed}, x.options());
  const Tensor d_x = needs_x ? empty_like(x) : Tensor();
  Tensor d_weights;
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const MlpCall<T> call = given.packed<T>(weights, memory, true, allow_bf16);
    const T *dy = d_y.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *states = kept.numel() ? kept.const_data_ptr<T>() : nullptr;
    check_lanes<T>(given.in.op, kept);
    T* const dx = needs_x ? d_x.mutable_data_ptr<T>() : nullptr;
    const auto tile = [&](const Sequences<T>& some, int64_t number, T* d, T* scratch) {
      const T* const own = states ? states + number * lane_count<T>() * values : nullptr;
      PSF_DISPATCH(mlp_tile_gradient<T>(call, some, dy, from, own, dx, d, scratch));
    };
    d_weights = sum_of_gradients<T>(given.tiles(), given.parts->weights, needs_weights, x.options(), given.scratch<T>(true), tile);
  });
  return {d_x, d_weights};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&mlp>("mlp");
  m.add<&mlp_backward>("mlp_backward");
}

}  // namespace psf
