// A Transformer's sizes, and where its parts are in the row of its weights.
#pragma once
#include "network.h"

namespace psf {

struct BlockPart {
  NormPart before_attention;
  LinearPart query, key_value, out;
  NormPart before_feedforward;
  LinearPart up, down;
};

// in: 0 without an embedding. out: 0 without a head. read: tokens that are output, all if empty.
struct TransformerSizes {
  int64_t in, width, layers, heads, feedforward, out, tokens;
  const int64_t* read;
  int64_t outputs;  // tokens that are output
  bool gelu;
  double eps;
  int64_t input() const { return in ? in : width; }
  int64_t state() const { return tokens * width; }  // of a sequence between the blocks
  int64_t widest() const { return std::max(std::max(feedforward, width), std::max(input(), output())); }
  int64_t widest_map() const { return std::max(widest(), 2 * width); }
  int64_t output() const { return out ? out : width; }
};

struct TransformerParts : WeightRow {
  LinearPart embed, hidden, head;
  int64_t positions = 0;
  NormPart last;
  std::vector<BlockPart> blocks;
  explicit TransformerParts(const TransformerSizes& sizes) {
    const int64_t W = sizes.width;
    if (sizes.in) {
      embed = linear(sizes.in, W);
      positions = take(sizes.tokens * W);
    }
    for (int64_t k = 0; k < sizes.layers; ++k) {
      BlockPart block;
      block.before_attention = norm(W);
      const int64_t weight = take(3 * W * W), bias = take(3 * W);
      block.query = part(W, W, W, weight, bias);
      block.key_value = part(W, 2 * W, W, weight + W * W, bias + W);
      block.out = linear(W, W);
      block.before_feedforward = norm(W);
      block.up = linear(W, sizes.feedforward);
      block.down = linear(sizes.feedforward, W);
      blocks.push_back(block);
    }
    if (sizes.out) {
      last = norm(W);
      hidden = linear(W, W);
      head = linear(W, sizes.out);
    }
  }
};

// What the tiles of one call share.
template <class T> struct TransformerCall {
  TransformerSizes sizes;
  const TransformerParts* parts;
  const BlockPart* blocks;
  Weights<T> weights;
};

}  // namespace psf
