// Arguments of the row ops: contiguous (B, S, N) with `rows` = B S rows; num_nodes (B,) or null.
#pragma once
#include <cstdint>

namespace psf::cuda {

template <class T> struct SoftPermutation {
  using Number = T;
  const T* scores;
  const int64_t* num_nodes;
  int64_t rows, S, N;
  T tau;
  int iterations;
  bool normalize, presorted;
  T *t, *log_r, *log_c;
  int64_t *order, *rank;
};
template <class T> struct SoftPermutationBackward {
  using Number = T;
  const T *d_t, *d_log_r, *d_log_c;  // null: zeros
  const T* scores;
  const int64_t* order;
  const T* t;
  const int64_t* num_nodes;
  int64_t rows, S, N;
  T tau;
  int iterations;
  bool normalize;
  T* d_scores;
};

// sums (B S): each row's part of the mean.
template <class T> struct PermutationEntropy {
  using Number = T;
  const T *t, *log_r, *log_c;
  const int64_t* num_nodes;
  int64_t rows, S, N;
  T tau;
  double* sums;
};
template <class T> struct PermutationEntropyBackward {
  using Number = T;
  const T* d_entropy;  // one number
  const T *t, *log_r, *log_c;
  const int64_t* num_nodes;
  int64_t rows, S, N;
  T tau;
  T *d_t, *d_log_r, *d_log_c;
};

}  // namespace psf::cuda
