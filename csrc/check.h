// The argument checks of the kernels, for memory safety in any call, torch.ops included. (An op's Python function has its own
// checks.) Sizes, dtypes, devices and counts are checked before anything is read; values (node numbers, slots, offsets)
// where they are read anyway.
#pragma once
#include <cstdint>
#include <limits>

#include "tensor.h"

namespace psf {

constexpr int64_t most_slots = (int64_t{1} << 24) - 1;  // float32 counts the slots of a row exactly
constexpr int64_t most_iterations = 10000;              // as in ops/permutation.py

// An axis of an op's tensors. The first tensor with this axis sets its size, and the others must agree.
struct Dim {
  const char* name;
  int64_t least = 0, most = std::numeric_limits<int64_t>::max(), size = -1;  // size: -1 until known
  operator int64_t() const { return size; }
};
using Dims = std::initializer_list<Dim*>;

// The arguments of one call.
class Arguments {
 public:
  explicit Arguments(const char* op, Device device = cpu()) : op(op), device_(device) {}
  const char* const op;

  // float32 or float64, the same for all tensors of a call.
  const Tensor& floats(const char* name, const Tensor& x);
  const Tensor& floats(const char* name, const Tensor& x, Dims dims);
  const Tensor& integers(const char* name, const Tensor& x, Dims dims, ScalarType type = kLong);
  // Contiguous; undefined if not given.
  Tensor floats(const char* name, const std::optional<Tensor>& x, Dims dims) {
    return x ? floats(name, *x, dims).contiguous() : Tensor();
  }
  Tensor integers(const char* name, const std::optional<Tensor>& x, Dims dims) {
    return x ? integers(name, *x, dims).contiguous() : Tensor();
  }
  // t, log_r and log_c of a soft permutation: all or none are given; none is refused if `needed`, for their gradients.
  void soft(const std::optional<Tensor>& t, const std::optional<Tensor>& log_r, const std::optional<Tensor>& log_c,
            double tau, Dims dims, bool needed = false);
  void same_shape(const char* name, const Tensor& x, const char* as, const Tensor& y) const;
  void count(const char* name, int64_t n, int64_t least, int64_t most) const;
  void temperature(double tau) const;

 private:
  const Device device_;
  const char* first_ = nullptr;  // the first floating tensor
  ScalarType dtype_ = ScalarType::Undefined;
  void memory(const char* name, const Tensor& x) const;
  void shape(const char* name, const Tensor& x, Dims dims) const;
};

// (B,) numbers of valid nodes, 1 to N each; null if all N are valid. CPU only.
class NumNodes {
  Tensor held_;
  const int64_t* counts_ = nullptr;

 public:
  NumNodes(Arguments& in, const std::optional<Tensor>& num_nodes, Dim& B, int64_t N);
  operator const int64_t*() const { return counts_; }
};

// offsets (B + 1): those of graphs of at most N nodes each.
void check_offsets(const char* op, const int64_t* offsets, int64_t B, int64_t N);

// n slots or nodes of a sample of graph b, used as memory indices: each must be 0 to end - 1.
void check_row(const char* op, const char* name, const int64_t* row, int64_t n, int64_t end, int64_t b);

// The first count(b) entries of every row of x (B, S, N): each must be 0 to limit(b) - 1.
template <class Count, class Limit>
void check_rows(const char* op, const char* name, const Tensor& x, Count count, Limit limit) {
  const int64_t *row = x.const_data_ptr<int64_t>(), B = x.size(0), S = x.size(1), N = x.size(2);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t s = 0; s < S; ++s, row += N) check_row(op, name, row, count(b), limit(b), b);
}

// The least number of loop iterations per thread: enough for `least` operations, at about `cost` per iteration.
inline int64_t grain(double cost, double least = 16384) { return 1 + static_cast<int64_t>(least / (1 + cost)); }

}  // namespace psf
