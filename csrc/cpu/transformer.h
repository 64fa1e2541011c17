// A Transformer's weights in one row, and where each of its parts is.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace psf {

struct LinearPart {
  int64_t in = 0, out = 0, weight = 0, bias = 0;  // where its (out, in) matrix and (out,) bias begin
  int64_t forward = 0, back = 0;                  // where its packed matrix, and that of its gradient, begin
};
struct NormPart {
  int64_t gain = 0, shift = 0;
};
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
  int64_t output() const { return out ? out : width; }
};

struct TransformerParts {
  LinearPart embed, hidden, head;
  int64_t positions = 0;
  NormPart norm;
  std::vector<BlockPart> blocks;
  int64_t weights = 0, packed = 0;  // values in all
  explicit TransformerParts(const TransformerSizes& sizes);

 private:
  int64_t take(int64_t count) {
    weights += count;
    return weights - count;
  }
  int64_t pack(int64_t in, int64_t out) {  // padded to any number of outputs at a time
    packed += (out + 3) * in;
    return packed - (out + 3) * in;
  }
  LinearPart linear(int64_t in, int64_t out);
  NormPart norm_of(int64_t width);
};

// What the tiles of one call share.
template <class T> struct TransformerCall {
  TransformerSizes sizes;
  const TransformerParts* parts;
  const BlockPart* blocks;
  const T* weights;
  T* packed;
};

// Up to a vector's lanes of sequences.
template <class T> struct Sequences {
  int64_t number[64 / sizeof(T)] = {};  // which of the batch
  int64_t length[64 / sizeof(T)] = {};  // valid tokens, 0 in a lane without a sequence
  int64_t tokens = 0;                   // the most valid ones
  int count = 0;
  bool ragged = false;
};

}  // namespace psf
