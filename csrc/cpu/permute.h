// What the kernels of permute read.
#pragma once
#include <cstdint>

namespace psf {

// Row i of a matrix is x + D at[i], or x + D i without `at`.
template <class T> struct MovedRows {
  const T* x;
  const int64_t* at;
  const T* row(int64_t i, int64_t D) const { return x + D * (at ? at[i] : i); }
};

constexpr int64_t few_numbers = 4;  // from here on the numbers of a row fill vectors better than samples do

}  // namespace psf
