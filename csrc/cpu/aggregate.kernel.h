// sums = sum of the rows of x with the numbers given, n numbers each.
#include "vectors.h"

template <class T> void sum_rows(const T* x, const int64_t* rows, int64_t count, int64_t n, T* sums) {
  std::memset(sums, 0, n * sizeof(T));
  for (int64_t k = 0; k < count; ++k) axpy(sums, T(1), x + rows[k] * n, n);
}
