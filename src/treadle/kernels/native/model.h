// What a decoder is made of, and what a pass of it is given. The plain structures are those of
// build.py, field by field.
#pragma once

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace treadle {

struct Shape {
  int32_t dim, heads, kv_heads, head_dim, hidden, layers, vocab, context, page, ropes, activation;
  float eps, scale, embedding_scale, score_cap, logit_cap;

  // Widths of rows: products fill whole strips, and rows of an odd number of cache lines do not
  // fight for the same places of the cache.
  int mixed() const { return heads * head_dim; }
  int q_width() const { return padded(mixed()); }
  int kv_width() const { return padded(kv_heads * head_dim); }
  int hidden_width() const { return hidden + kLanes; }
  int widest() const { return std::max({dim, mixed(), hidden}); }
  int room() const { return divide_up(context, 16) * 16; }

 private:
  static int padded(int n) { return divide_up(n, kStrip) * kStrip; }
};

struct Rope {  // pairs (i, i + count) of a head turn
  int32_t count;
  float factor;
  const float* frequencies;
};

// A product's weight, and what is added to it or null.
struct Linear {
  const Matrix* w;
  const float* bias;
};

// Norms and biases that a family lacks are null.
struct Layer {
  Linear q, k, v, out, gate, up, down;
  const float *mixer_norm, *mixer_after, *ffn_norm, *ffn_after, *q_norm, *k_norm;
  int window;  // 0 for none
  int rope;
};

struct Model {
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  const Matrix *embedding, *head;
  const float* norm;
};

// Sequences one after another; see treadle.inference.runner.Batch.
struct Pass {
  int32_t sequences;
  const int32_t *tokens, *counts, *starts, *outputs;
  const int32_t* tables;  // of each sequence, one after another
  const int32_t* table_at;
  uint16_t* pages;
  float* logits;
  float* hidden;   // if not null, the last layer's rows, normed, are wanted and no logits
  int32_t stride;  // from row to row of logits, vocab rounded up to a strip or more
};

}  // namespace treadle
