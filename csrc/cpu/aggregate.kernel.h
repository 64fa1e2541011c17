// sums += rows of x, n values each: those with the given indices, or `count` consecutive ones.
#include "vectors.h"

template <class T> void add_rows(const T* x, const int64_t* rows, int64_t count, int64_t n, T* sums) {
  for (int64_t k = 0; k < count; ++k) axpy(sums, T(1), x + rows[k] * n, n);
}
template <class T> void add_range(const T* x, int64_t count, int64_t n, T* sums) {
  for (int64_t k = 0; k < count; ++k) axpy(sums, T(1), x + k * n, n);
}
template <class T> void start_row(const T* x, T own, int64_t n, T* sums) {
  std::fill_n(sums, n, T(0));
  if (own != T(0)) axpy(sums, own, x, n);
}
template <class T> void product(const T* x, const T* y, int64_t n, T* out) { *out = dot(x, y, n); }
