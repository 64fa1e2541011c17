// Items on patches, shared by `embed` and `readout`. An item is a node (k = 1) or a pair of nodes (k = 2) of one graph, with
// C values. A sample's permutation puts it into a slot, or pair of slots, of the N (x N) array. Padding gives a slot any
// number of places along an axis of grid * patch. A place (pair) is in a token, at an offset in its patch. So an item has
// terms (token, offset), and every result is a sum over the terms of all items:
//   scatter               tokens[token] += scale value_c W[offset, c]
//   gather                value_c        = scale sum_samples <tokens[token], W[offset, c]>
//   weight_gradient       dW[offset, c] += scale value_c tokens[token]
//   permutation_gradient  dL/dP of L = scale sum value_c <tokens[token], W[offset, c]>, reduced to d_t, d_log_r, d_log_c
// tokens (B, S, L, D), W (patch^k, C, D), values (M, C).
#pragma once
#include "../check.h"

#include <array>
#include <vector>

namespace psf {

// The axes of the ops on patches, and their shared argument checks: `axes` axes of N slots each (one per node of an item),
// cut into `grid` patches of P = max(1, ceil(N / grid)).
struct PatchedAxes {
  Dim B{"B"}, S{"S"}, N{"N", 1, most_slots}, D{"D", 1}, C{"C", 1}, P{"P"}, L{"L"}, M{"M"};
  Dim k{"k"}, places{"grid P"}, offsets{"B + 1"};
  PatchedAxes(Arguments& in, int64_t axes, const Tensor& rank, const Tensor& order, const std::optional<Tensor>& t,
              const std::optional<Tensor>& log_r, const std::optional<Tensor>& log_c, double tau, const Tensor& slots,
              int64_t grid, const Tensor& weight, bool needs_t = false);
  void check_items(Arguments& in, const Tensor& items, const Tensor& ptr);
};
inline int64_t axes_of(const Tensor& weight) { return weight.dim() == 4 ? 2 : 1; }

// One axis: the places of the slots after padding, as (cell, offset in the patch).
struct Axis {
  int64_t grid, patch;
  std::vector<int32_t> start, cell, offset;  // the places of slot j are start[j] to start[j + 1] - 1
  Axis(const char* op, const Tensor& slots, int64_t grid, int64_t N);
};

// The soft permutation of a sample, or null pointers.
template <class T> struct Soft {
  const T *t, *log_r, *log_c;
  T* out[3];  // d_t, d_log_r, d_log_c
  T by_tau;
};
inline int64_t soft_scratch(int64_t N) { return 7 * (N + 16); }  // values that SoftRows needs, with vectors of up to 16

inline int64_t pairs(int64_t n) { return n * (n + 1) / 2; }  // of slots i <= j < n

// One term: row `to` of the result gets value times row `from`.
template <class T> struct Term {
  int32_t to, from;
  T value;
};

// What one sample's kernels read.
struct SampleView {
  const int64_t *rank, *order;       // slot of each local node and back
  int64_t first, nodes;              // global number of local node 0, valid nodes
  const int64_t *u, *v;              // items by global node numbers; v null if k = 1
  const int64_t* items;              // those of this graph
  int64_t count;
  const int64_t *u_begin, *u_items;  // items by first node and by second node: u_items[u_begin[node] ...]
  const int64_t *v_begin, *v_items;
};

class Items {
 public:
  int64_t k, M, B, S, N;
  // op, name: for errors. items (k, M), ptr (B + 1,), rank and order (B, S, N), int64; their values are checked.
  Items(const char* op, const char* name, const Tensor& items, const Tensor& ptr, const Tensor& rank, const Tensor& order);
  SampleView sample(int64_t b, int64_t s) const;
  int64_t graph(int64_t item) const { return graph_[item]; }
  int64_t nodes(int64_t graph) const { return ptr_.const_data_ptr<int64_t>()[graph + 1] - ptr_.const_data_ptr<int64_t>()[graph]; }
  void sort_by_node();  // for permutation_gradient; checks order, which a soft permutation's gradient reads
  // Whether the values of pairs (M, C) sum to a symmetric matrix in every graph.
  bool symmetric(const Tensor& values) const;
  // The sum of 2 num_nodes over the items of all samples: products with tokens in permutation_gradient without a GEMM.
  double products() const;

 private:
  const char* op_;
  Tensor items_, ptr_, rank_, order_;
  std::vector<int64_t> graph_, begin_, sorted_, begin_of_[2], by_[2];
};

Tensor weight_rows(const Tensor& weight);                        // (D, C, patch[, patch]) -> (patch^k, C, D), contiguous
Tensor weight_like(const Tensor& rows, const Tensor& weight);  // the inverse, a view

void scatter(const Items& items, const Axis& axis, const Tensor& values, double scale, const Tensor& W,
             const std::optional<Tensor>& bias, const Tensor& tokens);
Tensor gather(const Items& items, const Axis& axis, const Tensor& tokens, double scale, const Tensor& W);
Tensor weight_gradient(const Items& items, const Axis& axis, const Tensor& values, double scale, const Tensor& tokens,
                           IntArrayRef shape);
std::array<Tensor, 3> permutation_gradient(Items& items, const Axis& axis, const Tensor& values, double scale,
                                               const Tensor& tokens, const Tensor& W, const Tensor& t,
                                               const Tensor& log_r, const Tensor& log_c, double tau);

}  // namespace psf
