// batch_norm_relu and its gradient on the CPU: three passes over the rows, and two.
#include "rows.h"
#define PSF_KERNEL "batch_norm_relu.kernel.h"
#include "each_isa.h"

#include <vector>

namespace psf {
namespace {

using at::Tensor;

constexpr int64_t block = 256;  // rows summed at a time, whatever the threads

// (k C,) sums of f(first row, rows, sums) over blocks of rows, the blocks added in their order.
template <class T, class F> std::vector<T> block_sums(int64_t M, int64_t count, F f) {
  const int64_t blocks = (M + block - 1) / block;
  std::vector<T> parts(blocks * count);
  at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k * block, std::min(block, M - k * block), parts.data() + k * count);
  });
  std::vector<double> total(count);
  for (int64_t k = 0; k < blocks; ++k)
    for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(parts[k * count + c]);
  return std::vector<T>(total.begin(), total.end());
}

// y = scale x + shift, with the batch's mean and variance.
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

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x_in, const Tensor& weight, const Tensor& bias, double eps) {
  const Tensor x = x_in.contiguous(), y = at::empty_like(x), mean = at::empty({x.size(1)}, x.options()), variance = at::empty_like(mean);
  const int64_t M = x.size(0), C = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "batch_norm_relu", [&] {
    using T = scalar_t;
    const T* in = x.const_data_ptr<T>();
    T *m = mean.mutable_data_ptr<T>(), *v = variance.mutable_data_ptr<T>(), *out = y.mutable_data_ptr<T>();
    const auto sums = block_sums<T>(M, C, [&](int64_t row, int64_t rows, T* sum) { PSF_DISPATCH(add_all<T>(in + row * C, rows, C, sum)); });
    for (int64_t c = 0; c < C; ++c) m[c] = sums[c] / T(M);
    const auto squares =
        block_sums<T>(M, C, [&](int64_t row, int64_t rows, T* sum) { PSF_DISPATCH(add_squares<T>(in + row * C, m, rows, C, sum)); });
    for (int64_t c = 0; c < C; ++c) v[c] = squares[c] / T(M);
    const Affine<T> to(mean, variance, weight.contiguous(), bias.contiguous(), eps);
    at::parallel_for(0, M, block, [&](int64_t begin, int64_t end) {
      PSF_DISPATCH(scale_relu<T>(in + begin * C, to.scale.data(), to.shift.data(), end - begin, C, out + begin * C));
    });
  });
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& d_y_in, const Tensor& x_in, const Tensor& weight_in, const Tensor& bias,
                                                            const Tensor& mean, const Tensor& variance, double eps) {
  const Tensor d_y = d_y_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous();
  const Tensor d_x = at::empty_like(x), d_weight = at::empty_like(weight), d_bias = at::empty_like(weight);
  const int64_t M = x.size(0), C = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "batch_norm_relu_backward", [&] {
    using T = scalar_t;
    const T *d = d_y.const_data_ptr<T>(), *in = x.const_data_ptr<T>(), *m = mean.const_data_ptr<T>();
    T *out = d_x.mutable_data_ptr<T>(), *d_w = d_weight.mutable_data_ptr<T>(), *d_b = d_bias.mutable_data_ptr<T>();
    const Affine<T> to(mean, variance, weight, bias.contiguous(), eps);
    const auto sums = block_sums<T>(M, 2 * C, [&](int64_t row, int64_t rows, T* sum) {
      PSF_DISPATCH(add_gradients<T>(d + row * C, in + row * C, to.scale.data(), to.shift.data(), m, rows, C, sum, sum + C));
    });
    std::vector<T> offset(C), slope(C);
    for (int64_t c = 0; c < C; ++c) {
      d_b[c] = sums[c];
      d_w[c] = sums[C + c] * to.inverse[c];
      offset[c] = to.scale[c] * sums[c] / T(M);
      slope[c] = to.scale[c] * d_w[c] * to.inverse[c] / T(M);
    }
    at::parallel_for(0, M, block, [&](int64_t begin, int64_t end) {
      PSF_DISPATCH(input_gradients<T>(d + begin * C, in + begin * C, to.scale.data(), to.shift.data(), m, offset.data(), slope.data(),
                                      end - begin, C, out + begin * C));
    });
  });
  return {d_x, d_weight, d_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(probsym_fast, CPU, m) {
  m.impl("batch_norm_relu", &batch_norm_relu);
  m.impl("batch_norm_relu_backward", &batch_norm_relu_backward);
}

}  // namespace psf
