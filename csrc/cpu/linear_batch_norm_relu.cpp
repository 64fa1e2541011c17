// linear_batch_norm_relu and its gradient on the CPU, in blocks of rows that fit the L2 cache. z = x linear^T is stored in
// y's memory until y overwrites it. The gradient computes z again, block by block and bit by bit the same: once if it fits
// into d_x's memory, else once for the sums and once for d_z.
#include "../kernels.h"
#include "rows.h"
#define PSF_KERNEL "linear_batch_norm_relu.kernel.h"
#include "each_isa.h"

#include <vector>

namespace psf {
namespace {

constexpr int64_t block = 512;  // rows at a time, for any number of threads

// f(number, first row, rows) over blocks of rows.
template <class F> void for_each_block(int64_t M, F f) {
  parallel_for(0, (M + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k, k * block, std::min(block, M - k * block));
  });
}

// z = x linear^T of rows of a block.
template <class T> struct Product {
  const T *x, *linear_t;
  int64_t K, C;
  void operator()(int64_t row, int64_t rows, T* z) const { PSF_DISPATCH(products<T>(x + row * K, K, 1, linear_t, rows, K, C, z)); }
};

// The sum of parts (blocks, count), in their order.
template <class T> std::vector<T> added(const std::vector<T>& parts, int64_t count) {
  std::vector<double> total(count);
  for (size_t i = 0; i < parts.size(); i += count)
    for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(parts[i + c]);
  return std::vector<T>(total.begin(), total.end());
}

// relu(scale z + shift), with the batch's mean and variance.
template <class T> struct Affine {
  std::vector<T> scale, shift, inverse;
  Affine(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias, double eps) {
    const T *m = mean.const_data_ptr<T>(), *v = variance.const_data_ptr<T>(), *w = weight.const_data_ptr<T>(), *b = bias.const_data_ptr<T>();
    for (int64_t c = 0; c < mean.size(0); ++c) {
      inverse.push_back(T(1) / std::sqrt(v[c] + T(eps)));
      scale.push_back(w[c] * inverse[c]);
      shift.push_back(b[c] - m[c] * scale[c]);
    }
  }
};

void check(Arguments& in, const Tensor& x, const Tensor& linear, const Tensor& weight, const Tensor& bias, Dim& M, Dim& K, Dim& C) {
  in.floats("x", x, {&M, &K});
  in.floats("linear", linear, {&C, &K});
  in.floats("weight", weight, {&C});
  in.floats("bias", bias, {&C});
}

std::tuple<Tensor, Tensor, Tensor> linear_batch_norm_relu(const Tensor& x_in, const Tensor& linear, const Tensor& weight, const Tensor& bias, double eps) {
  Arguments in("linear_batch_norm_relu");
  Dim M{"M", 1}, K{"K"}, C{"C"};
  check(in, x_in, linear, weight, bias, M, K, C);
  const Tensor x = x_in.contiguous(), linear_t = linear.t().contiguous();
  const Tensor y = empty({M, C}, x.options()), mean = empty({C}, x.options()), variance = empty_like(mean);
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const int64_t blocks = (M + block - 1) / block;
    const Product<T> product{x.const_data_ptr<T>(), linear_t.const_data_ptr<T>(), K, C};
    T *z = y.mutable_data_ptr<T>(), *m = mean.mutable_data_ptr<T>(), *v = variance.mutable_data_ptr<T>();
    std::vector<T> parts(blocks * 2 * C);  // of every block: its mean, and the sum of squared distances from it
    for_each_block(M, [&](int64_t k, int64_t row, int64_t rows) {
      product(row, rows, z + row * C);
      PSF_DISPATCH(moments<T>(z + row * C, rows, C, parts.data() + k * 2 * C, parts.data() + (k * 2 + 1) * C));
    });
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0, squares = 0;
      const auto rows = [&](int64_t k) { return static_cast<double>(std::min(block, M - k * block)); };
      for (int64_t k = 0; k < blocks; ++k) sum += rows(k) * static_cast<double>(parts[k * 2 * C + c]);
      const double center = sum / static_cast<double>(M);
      for (int64_t k = 0; k < blocks; ++k) {
        const double distance = static_cast<double>(parts[k * 2 * C + c]) - center;
        squares += static_cast<double>(parts[(k * 2 + 1) * C + c]) + rows(k) * distance * distance;
      }
      m[c] = static_cast<T>(center);
      v[c] = static_cast<T>(squares / static_cast<double>(M));
    }
    const Affine<T> to(mean, variance, weight.contiguous(), bias.contiguous(), eps);
    parallel_for(0, M, block, [&](int64_t begin, int64_t end) {
      PSF_DISPATCH(scale_relu<T>(z + begin * C, to.scale.data(), to.shift.data(), end - begin, C));
    });
  });
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_batch_norm_relu_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& linear_in,
    const Tensor& weight_in, const Tensor& bias, const Tensor& mean_in, const Tensor& variance_in, double eps, bool needs_x, bool needs_linear) {
  Arguments in("linear_batch_norm_relu_backward");
  Dim M{"M", 1}, K{"K"}, C{"C"};
  check(in, x_in, linear_in, weight_in, bias, M, K, C);
  const Tensor mean = in.floats("mean", mean_in, {&C}).contiguous(), variance = in.floats("variance", variance_in, {&C}).contiguous();
  const Tensor d_y = in.floats("d_y", d_y_in, {&M, &C}).contiguous(), x = x_in.contiguous(), linear = linear_in.contiguous(), linear_t = linear.t().contiguous(), weight = weight_in.contiguous();
  const Tensor d_weight = empty_like(weight), d_bias = empty_like(weight);
  const int64_t blocks = (M + block - 1) / block;
  const bool narrow = K < 16;  // less than a vector: d_x by sums over C, and d_linear transposed
  const Tensor d_x = needs_x ? empty_like(x) : Tensor(), parts = needs_linear ? empty({blocks, narrow ? K : C, narrow ? C : K}, x.options()) : Tensor();
  PSF_DISPATCH_FLOATING(x.scalar_type(), [&] {
    using T = scalar_t;
    const T *d = d_y.const_data_ptr<T>(), *m = mean.const_data_ptr<T>();
    T *d_w = d_weight.mutable_data_ptr<T>(), *d_b = d_bias.mutable_data_ptr<T>();
    const Affine<T> to(mean, variance, weight, bias.contiguous(), eps);
    const Product<T> product{x.const_data_ptr<T>(), linear_t.const_data_ptr<T>(), K, C};
    std::vector<T> gradients(blocks * 2 * C);
    T* const space = needs_x && K >= C ? d_x.mutable_data_ptr<T>() : nullptr;  // if d_x has room for z, z is kept there
    for_each_group<T>(blocks, block * C, [&](int64_t k, T* scratch) {
      const int64_t row = k * block, rows = std::min(block, M - row);
      T *z = space ? space + row * K : scratch, *sum = gradients.data() + k * 2 * C;
      product(row, rows, z);
      PSF_DISPATCH(add_gradients<T>(d + row * C, z, to.scale.data(), to.shift.data(), m, rows, C, sum, sum + C));
    });
    const std::vector<T> sums = added(gradients, 2 * C);
    std::vector<T> offset(C), slope(C);
    for (int64_t c = 0; c < C; ++c) {
      d_b[c] = sums[c];
      d_w[c] = sums[C + c] * to.inverse[c];
      offset[c] = to.scale[c] * sums[c] / T(M);
      slope[c] = to.scale[c] * d_w[c] * to.inverse[c] / T(M);
    }
    if (!needs_x && !needs_linear) return;
    T *into = needs_x ? d_x.mutable_data_ptr<T>() : nullptr, *part = needs_linear ? parts.mutable_data_ptr<T>() : nullptr;
    for_each_group<T>(blocks, block * C, [&](int64_t k, T* d_z) {
      const int64_t row = k * block, rows = std::min(block, M - row);
      const T* z = space ? space + row * K : d_z;
      if (!space) product(row, rows, d_z);  // overwritten by d_z
      PSF_DISPATCH(input_gradients<T>(d + row * C, z, to.scale.data(), to.shift.data(), m, offset.data(), slope.data(), rows, C, d_z));
      const T* from = x.const_data_ptr<T>() + row * K;
      if (narrow) {
        if (into) PSF_DISPATCH(narrow_products<T>(d_z, C, linear_t.const_data_ptr<T>(), rows, C, K, into + row * K));
        if (part) PSF_DISPATCH(products<T>(from, 1, K, d_z, K, rows, C, part + k * C * K));
      } else {
        if (into) PSF_DISPATCH(products<T>(d_z, C, 1, linear.const_data_ptr<T>(), rows, C, K, into + row * K));
        if (part) PSF_DISPATCH(products<T>(d_z, 1, C, from, C, rows, K, part + k * C * K));
      }
    });
  });
  const Tensor d_linear = needs_linear ? sum(parts, {0}) : Tensor();
  return {d_x, needs_linear && narrow ? d_linear.t().contiguous() : d_linear, d_weight, d_bias};
}

}  // namespace

PSF_KERNELS(CPU, m) {
  m.add<&linear_batch_norm_relu>("linear_batch_norm_relu");
  m.add<&linear_batch_norm_relu_backward>("linear_batch_norm_relu_backward");
}

}  // namespace psf
