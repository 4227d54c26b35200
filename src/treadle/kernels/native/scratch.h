// What a pass works on: its rows, the pieces of its attention, and memory between the products.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "model.h"

namespace treadle {

// Of all threads.
struct Scratch {
  struct Row {
    int sequence, position;
  };
  struct Task {  // some queries of a sequence and a key-value head
    int sequence, kv_head, row, first, count;
  };

  std::vector<Row> rows;
  std::vector<int> wanted;  // rows whose logits or last vectors are
  std::vector<Task> tasks;
  Buffer<float> x, q, k, v, mixed, hidden, branch, turns;
  Activations shared;

  void lay_out(const Shape& s, const Pass& pass, bool branched) {
    rows.clear(), wanted.clear(), tasks.clear();
    const int group = s.heads / s.kv_heads;
    for (int i = 0; i < pass.sequences; ++i) {
      int row = int(rows.size()), count = pass.counts[i];
      for (int first = 0; first < count * group; first += kQueries)
        for (int head = 0; head < s.kv_heads; ++head)
          tasks.push_back({i, head, row, first, std::min(kQueries, count * group - first)});
      for (int j = 0; j < count; ++j) {
        if (j >= count - pass.outputs[i]) wanted.push_back(row + j);
        rows.push_back({i, pass.starts[i] + j});
      }
    }
    const size_t count = rows.size();
    x.reserve(count * s.dim);
    q.reserve(count * s.q_width());
    k.reserve(count * s.kv_width());
    v.reserve(count * s.kv_width());
    mixed.reserve(count * s.mixed());
    hidden.reserve(count * s.hidden_width());
    if (branched) branch.reserve(count * s.dim);
    turns.reserve(count * s.ropes * s.head_dim);
    shared.reserve(int(count), s.widest());
  }
};

// Of one thread.
struct Own {
  Activations activations;
  Buffer<float> normed, scores;

  void reserve(const Shape& s) {
    activations.reserve(kQueries, s.widest());
    normed.reserve(s.dim);
    scores.reserve(size_t(kQueries) * s.room());
  }
};

}  // namespace treadle
