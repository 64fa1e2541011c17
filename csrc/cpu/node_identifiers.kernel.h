// features[u, s] = weight[rank_s[u]] of one sample, features of rows S * D apart.
#include "vectors.h"
#include "soft_rows.h"

template <class T>
void identifier_gradient(const T* d_features, int64_t stride, const int64_t* order, int64_t nodes, const T* weight, int64_t D,
                         const Soft<T>& p, T* scratch) {
  SoftRows<T> rows(p, nodes, scratch);
  for (int64_t i = 0; i < nodes; ++i) {
    T* row = rows.begin_row();
    const T* d = d_features + order[i] * stride;
    for (int64_t j = 0; j < nodes; ++j) row[j] = dot(d, weight + j * D, D);
    rows.end_row(i);
  }
  rows.finish(p);
}

template <class T> void add_row(T* sum, const T* x, int64_t n) { axpy(sum, T(1), x, n); }
