// features[u, s] = weight[rank_s[u]] of one sample, features of rows S * D apart.
#include "vectors.h"
#include "products.h"
#include "soft_rows.h"

// weight_t (D, slots): the transposed weight; scratch: soft_scratch(N) + nodes * slots values.
template <class T>
void identifier_gradient(const T* d_features, int64_t stride, const int64_t* order, int64_t nodes, const T* weight_t, int64_t slots,
                         int64_t D, const Soft<T>& p, T* scratch) {
  SoftRows<T> rows(p, nodes, scratch);
  T* const all = scratch + soft_scratch(slots);  // of every node: its gradient times the weight of every slot
  products<T>(d_features, stride, 1, weight_t, nodes, D, std::min(slots, (nodes + 63) / 64 * 64), all, slots);
  for (int64_t i = 0; i < nodes; ++i) {
    std::copy_n(all + order[i] * slots, nodes, rows.begin_row());
    rows.end_row(i);
  }
  rows.finish(p);
}

template <class T> void add_row(T* sum, const T* x, int64_t n) { axpy(sum, T(1), x, n); }
