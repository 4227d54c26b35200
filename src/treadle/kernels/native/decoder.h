// One pass of a Llama: all layers in one parallel region, five barriers a layer.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "attention.h"
#include "matrix.h"
#include "pool.h"

namespace treadle {

struct Shape {
  int32_t dim, heads, kv_heads, head_dim, hidden, layers, vocab, context, page, turned;
  float eps, scale, turn_factor;
};

struct Layer {
  const Matrix *qkv, *out, *gate_up, *down;  // gate_up: strips of gate and up in turn
  const float *mixer_norm, *ffn_norm;
};

// Sequences one after another; see treadle.inference.runner.Batch.
struct Pass {
  int32_t sequences;
  const int32_t *tokens, *counts, *starts, *outputs;
  const int32_t* tables;  // of each sequence, one after another
  const int32_t* table_at;
  float* logits;
};

class Decoder {
 public:
  Decoder(const Shape& shape, int threads, std::vector<Layer> layers, const Matrix* embedding,
          const Matrix* head, const float* norm, const float* frequencies, uint16_t* pages)
      : s_(shape),
        pool_(threads),
        layers_(std::move(layers)),
        embedding_(embedding),
        head_(head),
        norm_(norm),
        frequencies_(frequencies),
        pages_(pages),
        own_(new Own[threads]),
        next_(new std::atomic<int>[s_.layers]) {}

  bool alive() const { return pool_.alive(); }

  void run(const Pass& pass) {
    lay_out(pass);
    pool_.run([&](int thread) { work(pass, thread); });
  }

 private:
  struct Row {
    int sequence, position;
  };
  struct Task {  // some queries of a sequence and a key-value head
    int sequence, kv_head, row, first, count;
  };
  struct Own {  // of one thread
    Activations activations;
    Buffer<float> normed, scores;
  };

  const Shape s_;
  Pool pool_;
  const std::vector<Layer> layers_;
  const Matrix *embedding_, *head_;
  const float *norm_, *frequencies_;
  uint16_t* pages_;
  std::unique_ptr<Own[]> own_;
  std::unique_ptr<std::atomic<int>[]> next_;
  std::vector<Row> rows_;
  std::vector<int> wanted_;
  std::vector<Task> tasks_;
  Buffer<float> x_, qkv_, mixed_, hidden_, turns_;
  Activations shared_;

  int qkv_width() const { return (s_.heads + 2 * s_.kv_heads) * s_.head_dim; }
  int mixed_width() const { return s_.heads * s_.head_dim; }
  int room() const { return divide_up(s_.context, 16) * 16; }

  void lay_out(const Pass& pass) {
    rows_.clear(), wanted_.clear(), tasks_.clear();
    const int group = s_.heads / s_.kv_heads;
    for (int i = 0; i < pass.sequences; ++i) {
      int row = int(rows_.size()), count = pass.counts[i];
      for (int first = 0; first < count * group; first += kTile)
        for (int head = 0; head < s_.kv_heads; ++head)
          tasks_.push_back({i, head, row, first, std::min(kTile, count * group - first)});
      for (int j = 0; j < count; ++j) {
        if (j >= count - pass.outputs[i]) wanted_.push_back(row + j);
        rows_.push_back({i, pass.starts[i] + j});
      }
    }
    const int rows = int(rows_.size());
    const int widest = std::max({s_.dim, mixed_width(), s_.hidden});
    x_.reserve(size_t(rows) * s_.dim);
    qkv_.reserve(size_t(rows) * qkv_width());
    mixed_.reserve(size_t(rows) * mixed_width());
    hidden_.reserve(size_t(rows) * s_.hidden);
    turns_.reserve(size_t(rows) * 2 * s_.turned);
    shared_.reserve(rows, widest);
    for (int t = 0; t < pool_.size; ++t) {
      own_[t].activations.reserve(kTile, widest);
      own_[t].normed.reserve(s_.dim);
      own_[t].scores.reserve(size_t(kTile) * room());
    }
    for (int layer = 0; layer < s_.layers; ++layer) next_[layer] = 0;
  }

  void work(const Pass& pass, int thread) {
    const int rows = int(rows_.size());
    auto [first, last] = pool_.share(rows, thread);
    for (int row = first; row < last; ++row) {
      embedding_->unpack_row(pass.tokens[row], x_.data() + size_t(row) * s_.dim);
      float* turn = turns_.data() + size_t(row) * 2 * s_.turned;
      for (int i = 0; i < s_.turned; ++i) {
        float angle = float(rows_[row].position) * frequencies_[i];
        turn[i] = std::cos(angle) * s_.turn_factor;
        turn[s_.turned + i] = std::sin(angle) * s_.turn_factor;
      }
    }
    pool_.barrier();
    for (int layer = 0; layer < s_.layers; ++layer) {
      const Layer& l = layers_[layer];
      project(pass, layer, normed(l.mixer_norm, rows, thread), thread);
      pool_.barrier();
      attend_all(pass, layer, thread);
      pool_.barrier();
      add(*l.out, rounded_rows(mixed_.data(), mixed_width(), rows, thread), thread);
      pool_.barrier();
      gate(*l.gate_up, normed(l.ffn_norm, rows, thread), thread);
      pool_.barrier();
      add(*l.down, rounded_rows(hidden_.data(), s_.hidden, rows, thread), thread);
      pool_.barrier();
    }
    if (wanted_.empty()) return;
    logits(pass, thread);
  }

  // Rows as activations, by `fill(activations, row)`. Few rows each thread rounds for itself:
  // that is sooner done than waiting for the others.
  template <class Fill>
  const Activations& prepared(int rows, int columns, int thread, Fill fill) {
    if (rows <= std::min(kTile, pool_.size)) {
      Activations& own = own_[thread].activations;
      own.reserve(rows, columns);
      for (int row = 0; row < rows; ++row) fill(own, row);
      return own;
    }
    if (thread == 0) shared_.reserve(rows, columns);
    pool_.barrier();
    auto [first, last] = pool_.share(rows, thread);
    for (int row = first; row < last; ++row) fill(shared_, row);
    pool_.barrier();
    return shared_;
  }

  const Activations& rounded_rows(const float* from, int columns, int rows, int thread) {
    return prepared(rows, columns, thread, [=](Activations& to, int row) {
      to.set(row, from + size_t(row) * columns, columns);
    });
  }

  const Activations& normed(const float* gain, int rows, int thread,
                            const int* which = nullptr) {
    float* y = own_[thread].normed.data();
    return prepared(rows, s_.dim, thread, [=, this](Activations& to, int row) {
      const float* x = x_.data() + size_t(which ? which[row] : row) * s_.dim;
      f32x16 sum = {};
      for (int d = 0; d < s_.dim; d += 16) {
        f32x16 part = load<f32x16>(x + d);
        sum += part * part;
      }
      float inverse = 1 / std::sqrt(total(sum) / float(s_.dim) + s_.eps);
      for (int d = 0; d < s_.dim; d += 16)
        store(y + d, load<f32x16>(x + d) * inverse * load<f32x16>(gain + d));
      to.set(row, y, s_.dim);
    });
  }

  // Queries, keys and values; each thread turns and stores the heads that it computed.
  void project(const Pass& pass, int layer, const Activations& x, int thread) {
    const int dim = s_.head_dim, strips = dim / kStrip, width = qkv_width();
    const int rows = int(rows_.size());
    // Key and value of a head stay together, for they are stored together.
    auto [first, last] = pool_.share(s_.heads, thread);
    auto keep = [&](int strip, int row, f32x16 y) {
      store(qkv_.data() + size_t(row) * width + strip * kStrip, y);
    };
    multiply(*layers_[layer].qkv, first * strips, last * strips, x, rows, keep);
    for (int row = 0; row < rows; ++row)
      for (int head = first; head < last; ++head)
        turn(qkv_.data() + size_t(row) * width + head * dim, row, s_.scale);
    auto [kv_first, kv_last] = pool_.share(s_.kv_heads, pool_.size - 1 - thread);
    const int start = s_.heads * strips;
    multiply(*layers_[layer].qkv, start + 2 * kv_first * strips, start + 2 * kv_last * strips, x,
             rows, keep);
    for (int row = 0; row < rows; ++row) {
      auto [sequence, position] = rows_[row];
      int page = pass.tables[pass.table_at[sequence] + position / s_.page];
      for (int head = kv_first; head < kv_last; ++head) {
        float* k = qkv_.data() + size_t(row) * width + mixed_width() + 2 * head * dim;
        turn(k, row, 1);
        pages_of(layer, head).put(page, position % s_.page, k, k + dim);
      }
    }
  }

  void turn(float* x, int row, float factor) const {
    const int half = s_.turned;
    const float* cosine = turns_.data() + size_t(row) * 2 * half;
    const float* sine = cosine + half;
    for (int i = 0; i < half; ++i) {
      float left = x[i], right = x[i + half];
      x[i] = (left * cosine[i] - right * sine[i]) * factor;
      x[i + half] = (right * cosine[i] + left * sine[i]) * factor;
    }
    for (int i = 2 * half; i < s_.head_dim; ++i) x[i] *= factor;
  }

  Pages pages_of(int layer, int head) const {
    const size_t both = size_t(2) * s_.page * s_.head_dim;
    return {pages_ + (size_t(layer) * s_.kv_heads + head) * both,
            both * s_.kv_heads * s_.layers, s_.page, s_.head_dim};
  }

  void attend_all(const Pass& pass, int layer, int thread) {
    const int group = s_.heads / s_.kv_heads, dim = s_.head_dim;
    for (;;) {
      size_t at = next_[layer].fetch_add(1, std::memory_order_relaxed);
      if (at >= tasks_.size()) return;
      const Task& task = tasks_[at];
      Query queries[kTile];
      for (int i = 0; i < task.count; ++i) {
        int row = task.row + (task.first + i) / group;
        int head = task.kv_head * group + (task.first + i) % group;
        queries[i] = {qkv_.data() + size_t(row) * qkv_width() + head * dim,
                      mixed_.data() + size_t(row) * mixed_width() + head * dim,
                      rows_[row].position + 1};
      }
      attend(task.count, queries, pages_of(layer, task.kv_head),
             pass.tables + pass.table_at[task.sequence], own_[thread].scores.data(), room());
    }
  }

  void add(const Matrix& w, const Activations& x, int thread) {
    auto [first, last] = pool_.share(w.strips, thread);
    multiply(w, first, last, x, int(rows_.size()), [&](int strip, int row, f32x16 y) {
      float* to = x_.data() + size_t(row) * s_.dim + strip * kStrip;
      store(to, load<f32x16>(to) + y);
    });
  }

  void gate(const Matrix& w, const Activations& x, int thread) {
    auto [first, last] = pool_.share(w.strips / 2, thread);
    multiply(w, 2 * first, 2 * last, x, int(rows_.size()), [&](int strip, int row, f32x16 y) {
      float* to = hidden_.data() + size_t(row) * s_.hidden + strip / 2 * kStrip;
      if (strip % 2 == 0) return store(to, y);
      f32x16 gate = load<f32x16>(to);
      store(to, gate * y / (1.0f + exponential(-gate)));
    });
  }

  void logits(const Pass& pass, int thread) {
    const int rows = int(wanted_.size());
    const Activations& x = normed(norm_, rows, thread, wanted_.data());
    auto [first, last] = pool_.share(head_->strips, thread);
    multiply(*head_, first, last, x, rows, [&](int strip, int row, f32x16 y) {
      float* to = pass.logits + size_t(row) * s_.vocab + strip * kStrip;
      if ((strip + 1) * kStrip <= s_.vocab) return store(to, y);
      memcpy(to, &y, (s_.vocab - strip * kStrip) * sizeof(float));
    });
  }
};

}  // namespace treadle
