// The layers of a multilayer perceptron, and where they are in the row of its weights.
#pragma once
#include "network.h"

namespace psf {

constexpr int64_t mlp_rows = 5;  // of x side by side in a lane, as ops/mlp.py knows: as many as a linear map takes at a time

struct MlpSizes {
  int64_t layers, in, out, widest;
  int64_t kept;         // features that have to be kept of a row: what goes into activations after the first layer
  int64_t activation;   // an Activation
  bool first, last;     // whether it stands before the first layer, and after the last
};
struct MlpParts : WeightRow {
  std::vector<LinearPart> layers;
  MlpSizes sizes;
  MlpParts(const Integers& widths, int64_t activation, bool first, bool last) {
    sizes = {static_cast<int64_t>(widths.size()) - 1, widths.front(), widths.back(), widths.front(), last ? widths.back() : 0, activation, first, last};
    for (int64_t k = 0; k < sizes.layers; ++k) {
      layers.push_back(linear(widths[k], widths[k + 1]));
      sizes.widest = std::max(sizes.widest, widths[k + 1]);
      if (k + 1 < sizes.layers) sizes.kept += widths[k + 1];
    }
  }
};

template <class T> struct MlpCall {
  MlpSizes sizes;
  const LinearPart* layers;
  Weights<T> weights;
};

}  // namespace psf
