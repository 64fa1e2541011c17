// The sizes of an edge convolution of Vector Neurons, and what its tiles read.
#pragma once
#include "rows.h"

#include <cmath>
#include <cstring>

namespace psf {

struct EdgeSizes {
  int64_t in, width, dim, nodes, clouds, neighbors;
  int64_t rows() const { return nodes * dim; }  // of a plane: the d components of every node
  int64_t maps() const { return 4 * width; }    // of a node: norm part and direction part, each as a neighbour and as a center
};

template <class T> struct EdgeCall {
  EdgeSizes sizes;
  const T *maps, *pool, *x;         // (4 w, in), (w, w), (in, d, n, M)
  T *forward, *back, *norm_back, *pooling;  // packed: maps, their transpose, that of the first 2 w, pool
  const T *scale, *shift;           // (w,): |p| becomes scale |p| + shift
  const int64_t* num_nodes;         // (M,): the first nodes of a cloud that are valid; null: all
};

inline int64_t edge_gradients(const EdgeSizes& s) { return s.maps() * s.in + 2 * s.width; }  // of maps, scale and shift

}  // namespace psf
