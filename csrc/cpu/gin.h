// The sizes of a GIN of one linear map a layer, where its parts are in the row of its weights, and its tiles.
#pragma once
#include "adjacency.h"
#include "network.h"

namespace psf {

struct GinSizes {
  int64_t width, layers, out;
  int64_t activation;  // after every layer: an Activation
  bool final;          // and after the output
};
// In the row: eps (layers), the first bias, the other layers, the output.
struct GinParts : WeightRow {
  int64_t eps, first;
  std::vector<LinearPart> layers;  // all but the first
  LinearPart out;
  explicit GinParts(const GinSizes& sizes) {
    eps = take(sizes.layers);
    first = take(sizes.width);
    for (int64_t k = 1; k < sizes.layers; ++k) layers.push_back(linear(sizes.width, sizes.width));
    out = linear(sizes.width, sizes.out);
  }
};

// Some samples of one graph.
struct GinTilePlace {
  int64_t graph, first, nodes, sample, samples;
};

template <class T> struct GinCall {
  GinSizes sizes;
  int64_t nodes, samples;  // of the batch
  const T* weights;
  T* transposed;           // (in, out) of every linear map, as packed
  const LinearPart* layers;
  LinearPart out;
  int64_t eps, first;
  const int64_t *in_begin, *in_neighbors, *out_begin, *out_neighbors;  // edges by their ends, and by their beginnings
};

}  // namespace psf
