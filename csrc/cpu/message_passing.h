// The sizes of message passing on complete graphs, and where its parts are in the row of its weights.
#pragma once
#include "network.h"

namespace psf {

struct MessageSizes {
  int64_t in, edge, width, layers, out, nodes;
  // How many receivers' pairs are computed at a time: about 64 pairs, which fit the second cache.
  int64_t receivers() const { return std::clamp<int64_t>(nodes > 1 ? 64 / (nodes - 1) : 1, 1, nodes); }
  int64_t state() const { return nodes * width; }  // of a graph between the layers
  int64_t widest() const { return std::max(std::max(in, edge), std::max(width, out)); }
};
struct MessagePart {
  LinearPart receiver, sender, edge;  // the three parts of `pair`; edge has its bias
  LinearPart message, node, received, update;  // node and received: the parts of update's first map; node has its bias
};
struct MessageParts : WeightRow {
  LinearPart embed, hidden, out;
  std::vector<MessagePart> layers;
  explicit MessageParts(const MessageSizes& sizes) {
    const int64_t W = sizes.width, joined = 2 * W + sizes.edge;
    embed = linear(sizes.in, W);
    for (int64_t k = 0; k < sizes.layers; ++k) {
      MessagePart layer;
      const int64_t pair = take(joined * W), pair_bias = take(W);
      layer.receiver = part(W, W, joined, pair, pair_bias);
      layer.sender = part(W, W, joined, pair + W, pair_bias);
      layer.edge = part(sizes.edge, W, joined, pair + 2 * W, pair_bias);
      layer.message = linear(W, W);
      const int64_t first = take(2 * W * W), first_bias = take(W);
      layer.node = part(W, W, 2 * W, first, first_bias);
      layer.received = part(W, W, 2 * W, first + W, first_bias);
      layer.update = linear(W, W);
      layers.push_back(layer);
    }
    hidden = linear(W, W);
    out = linear(W, sizes.out);
  }
};

template <class T> struct MessageCall {
  MessageSizes sizes;
  const MessageParts* parts;
  const MessagePart* layers;
  Weights<T> weights;
  int64_t share;  // graphs side by side that have the same edges
};

}  // namespace psf
