// One pass of a decoder: all layers in one parallel region, six barriers a layer.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "activation.h"
#include "attention.h"
#include "matrix.h"
#include "pool.h"

namespace treadle {

struct Shape {
  int32_t dim, heads, kv_heads, head_dim, hidden, layers, vocab, context, page, ropes, activation;
  float eps, scale, embedding_scale, score_cap, logit_cap;
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

class Decoder {
 public:
  Decoder(const Shape& shape, int threads, Model model)
      : s_(shape), pool_(threads), m_(std::move(model)), own_(new Own[threads]) {}

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
  const Model m_;
  std::unique_ptr<Own[]> own_;
  std::vector<Row> rows_;
  std::vector<int> wanted_;
  std::vector<Task> tasks_;
  Buffer<float> x_, q_, k_, v_, mixed_, hidden_, branch_, turns_;
  Activations shared_;

  static int padded(int n) { return divide_up(n, kStrip) * kStrip; }
  int q_width() const { return padded(s_.heads * s_.head_dim); }
  // Odd in cache lines, lest the rows fight for the same places of the cache.
  int hidden_width() const { return s_.hidden + kLanes; }
  int kv_width() const { return padded(s_.kv_heads * s_.head_dim); }
  int room() const { return divide_up(s_.context, 16) * 16; }
  float* turn_of(int row, int rope) const {
    return turns_.data() + (size_t(row) * s_.ropes + rope) * s_.head_dim;
  }

  void lay_out(const Pass& pass) {
    rows_.clear(), wanted_.clear(), tasks_.clear();
    const int group = s_.heads / s_.kv_heads;
    for (int i = 0; i < pass.sequences; ++i) {
      int row = int(rows_.size()), count = pass.counts[i];
      for (int first = 0; first < count * group; first += kQueries)
        for (int head = 0; head < s_.kv_heads; ++head)
          tasks_.push_back({i, head, row, first, std::min(kQueries, count * group - first)});
      for (int j = 0; j < count; ++j) {
        if (j >= count - pass.outputs[i]) wanted_.push_back(row + j);
        rows_.push_back({i, pass.starts[i] + j});
      }
    }
    const int rows = int(rows_.size());
    const int widest = std::max({s_.dim, s_.heads * s_.head_dim, s_.hidden});
    x_.reserve(size_t(rows) * s_.dim);
    q_.reserve(size_t(rows) * q_width());
    k_.reserve(size_t(rows) * kv_width());
    v_.reserve(size_t(rows) * kv_width());
    mixed_.reserve(size_t(rows) * s_.heads * s_.head_dim);
    hidden_.reserve(size_t(rows) * hidden_width());
    if (m_.layers[0].mixer_after) branch_.reserve(size_t(rows) * s_.dim);
    turns_.reserve(size_t(rows) * s_.ropes * s_.head_dim);
    shared_.reserve(rows, widest);
    for (int t = 0; t < pool_.size; ++t) {
      own_[t].activations.reserve(kQueries, widest);
      own_[t].normed.reserve(s_.dim);
      own_[t].scores.reserve(size_t(kQueries) * room());
    }
  }

  void work(const Pass& pass, int thread) {
    const int rows = int(rows_.size());
    begin(pass, thread);
    pool_.barrier();
    for (int layer = 0; layer < s_.layers; ++layer) {
      const Layer& l = m_.layers[layer];
      project(l, normed(l.mixer_norm, rows, thread), thread);
      pool_.barrier();
      turn(pass, layer, thread);
      pool_.barrier();
      attend_all(pass, layer, thread);
      pool_.barrier();
      const int mixed = s_.heads * s_.head_dim;
      add(l.out, l.mixer_after, rounded_rows(mixed_.data(), mixed, mixed, thread), thread);
      gate(l, normed(l.ffn_norm, rows, thread), thread);
      pool_.barrier();
      add(l.down, l.ffn_after, rounded_rows(hidden_.data(), s_.hidden, hidden_width(), thread), thread);
    }
    if (wanted_.empty()) return;
    pass.hidden ? hidden(pass, thread) : logits(pass, thread);
  }

  // Embeddings, and the rotations of each position.
  void begin(const Pass& pass, int thread) {
    auto [first, last] = pool_.share(int(rows_.size()), thread);
    for (int row = first; row < last; ++row) {
      float* x = x_.data() + size_t(row) * s_.dim;
      m_.embedding->unpack_row(pass.tokens[row], x);
      for (int d = 0; d < s_.dim; ++d) x[d] *= s_.embedding_scale;
      for (int rope = 0; rope < s_.ropes; ++rope) {
        const Rope& r = m_.ropes[rope];
        float* turn = turn_of(row, rope);
        for (int i = 0; i < r.count; ++i) {
          float angle = float(rows_[row].position) * r.frequencies[i];
          turn[i] = std::cos(angle) * r.factor;
          turn[r.count + i] = std::sin(angle) * r.factor;
        }
      }
    }
  }

  // Rows as activations, by `fill(activations, row)`. Few rows each thread rounds for itself:
  // that is sooner done than waiting for the others.
  template <class Fill>
  const Activations& prepared(int rows, int columns, int thread, Fill fill) {
    if (rows <= std::min(kQueries, pool_.size)) {
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

  const Activations& rounded_rows(const float* from, int columns, int stride, int thread) {
    return prepared(int(rows_.size()), columns, thread, [=](Activations& to, int row) {
      to.set(row, from + size_t(row) * stride);
    });
  }

  const Activations& normed(const float* gain, int rows, int thread,
                            const int* which = nullptr) {
    float* y = own_[thread].normed.data();
    return prepared(rows, s_.dim, thread, [=, this](Activations& to, int row) {
      norm(x_.data() + size_t(which ? which[row] : row) * s_.dim, gain, s_.dim, s_.eps, y);
      to.set(row, y);
    });
  }

  // Each strip of `count` as f(strip, first row, last row), while a block of rows is in the cache.
  template <class F>
  void strips(int count, int rows, int thread, F f) {
    pool_.each(thread, count, [&](int i) {
      for (int first = 0; first < rows; first += kBlock)
        f(i, first, std::min(first + kBlock, rows));
    });
  }

  // to = W x + bias, rows of `stride`.
  void product(const Linear& l, int i, const Activations& x, int first, int last, float* to,
               int stride) const {
    multiply(*l.w, i, x, first, last, [=](int row, const f32x16* y) {
      for (int h = 0; h < 2; ++h) {
        int at = i * kStrip + kLanes * h;
        store(to + size_t(row) * stride + at, l.bias ? y[h] + load<f32x16>(l.bias + at) : y[h]);
      }
    });
  }

  void project(const Layer& l, const Activations& x, int thread) {
    const int q = l.q.w->strips, kv = l.k.w->strips;
    strips(q + 2 * kv, int(rows_.size()), thread, [&](int i, int first, int last) {
      if (i < q) return product(l.q, i, x, first, last, q_.data(), q_width());
      if (i < q + kv) return product(l.k, i - q, x, first, last, k_.data(), kv_width());
      product(l.v, i - q - kv, x, first, last, v_.data(), kv_width());
    });
  }

  // Turns queries and keys, and stores keys and values.
  void turn(const Pass& pass, int layer, int thread) {
    const Layer& l = m_.layers[layer];
    const int dim = s_.head_dim, heads = s_.heads + s_.kv_heads;
    auto [first, last] = pool_.share(int(rows_.size()) * heads, thread);
    for (int i = first; i < last; ++i) {
      const int row = i / heads, head = i % heads, kv = head - s_.heads;
      if (kv < 0) {
        float* q = q_.data() + size_t(row) * q_width() + head * dim;
        if (l.q_norm) norm(q, l.q_norm, dim, s_.eps, q);
        rotate(q, row, l.rope, s_.scale);
        continue;
      }
      float* k = k_.data() + size_t(row) * kv_width() + kv * dim;
      if (l.k_norm) norm(k, l.k_norm, dim, s_.eps, k);
      rotate(k, row, l.rope, 1);
      auto [sequence, position] = rows_[row];
      int page = pass.tables[pass.table_at[sequence] + position / s_.page];
      pages_of(pass, layer, kv).put(page, position % s_.page, k,
                              v_.data() + size_t(row) * kv_width() + kv * dim);
    }
  }

  void rotate(float* x, int row, int rope, float factor) const {
    const int half = m_.ropes[rope].count;
    const float* cosine = turn_of(row, rope);
    const float* sine = cosine + half;
    for (int i = 0; i < half; ++i) {
      float left = x[i], right = x[i + half];
      x[i] = (left * cosine[i] - right * sine[i]) * factor;
      x[i + half] = (right * cosine[i] + left * sine[i]) * factor;
    }
    for (int i = 2 * half; i < s_.head_dim; ++i) x[i] *= factor;
  }

  Pages pages_of(const Pass& pass, int layer, int head) const {
    const size_t both = size_t(2) * s_.page * s_.head_dim;
    return {pass.pages + (size_t(layer) * s_.kv_heads + head) * both,
            both * s_.kv_heads * s_.layers, s_.page, s_.head_dim};
  }

  void attend_all(const Pass& pass, int layer, int thread) {
    const int group = s_.heads / s_.kv_heads, dim = s_.head_dim;
    const int window = m_.layers[layer].window;
    pool_.each(thread, int(tasks_.size()), [&](int at) {
      const Task& task = tasks_[at];
      Query queries[kQueries];
      for (int i = 0; i < task.count; ++i) {
        int row = task.row + (task.first + i) / group;
        int head = task.kv_head * group + (task.first + i) % group;
        int last = rows_[row].position + 1;
        queries[i] = {q_.data() + size_t(row) * q_width() + head * dim,
                      mixed_.data() + (size_t(row) * s_.heads + head) * dim,
                      window ? std::max(0, last - window) : 0, last};
      }
      attend(task.count, queries, pages_of(pass, layer, task.kv_head),
             pass.tables + pass.table_at[task.sequence], s_.score_cap,
             own_[thread].scores.data(), room());
    });
  }

  // x += W y, normed where the family does so.
  void add(const Linear& l, const float* after_norm, const Activations& y, int thread) {
    const int rows = int(rows_.size());
    if (after_norm) {
      strips(l.w->strips, rows, thread, [&](int i, int first, int last) {
        product(l, i, y, first, last, branch_.data(), s_.dim);
      });
      pool_.barrier();
      auto [first, last] = pool_.share(rows, thread);
      for (int row = first; row < last; ++row) {
        float* branch = branch_.data() + size_t(row) * s_.dim;
        float* x = x_.data() + size_t(row) * s_.dim;
        norm(branch, after_norm, s_.dim, s_.eps, branch);
        for (int d = 0; d < s_.dim; ++d) x[d] += branch[d];
      }
    } else {
      strips(l.w->strips, rows, thread, [&](int i, int first, int last) {
        multiply(*l.w, i, y, first, last, [&](int row, const f32x16* sums) {
          for (int h = 0; h < 2; ++h) {
            int at = i * kStrip + kLanes * h;
            float* x = x_.data() + size_t(row) * s_.dim + at;
            f32x16 sum = load<f32x16>(x) + sums[h];
            store(x, l.bias ? sum + load<f32x16>(l.bias + at) : sum);
          }
        });
      });
    }
    pool_.barrier();
  }

  void gate(const Layer& l, const Activations& x, int thread) {
    const int width = hidden_width();
    strips(l.gate.w->strips, int(rows_.size()), thread, [&](int i, int first, int last) {
      product(l.gate, i, x, first, last, hidden_.data(), width);
      multiply(*l.up.w, i, x, first, last, [&](int row, const f32x16* up) {
        for (int h = 0; h < 2; ++h) {
          int at = i * kStrip + kLanes * h;
          float* to = hidden_.data() + size_t(row) * width + at;
          f32x16 y = l.up.bias ? up[h] + load<f32x16>(l.up.bias + at) : up[h];
          store(to, activated(load<f32x16>(to), s_.activation) * y);
        }
      });
    });
  }

  void hidden(const Pass& pass, int thread) {
    auto [first, last] = pool_.share(int(wanted_.size()), thread);
    for (int row = first; row < last; ++row)
      norm(x_.data() + size_t(wanted_[row]) * s_.dim, m_.norm, s_.dim, s_.eps,
           pass.hidden + size_t(row) * s_.dim);
  }

  void logits(const Pass& pass, int thread) {
    // Few rows stay in the cache for whoever reads them; many would have to be fetched into it
    // before they are overwritten.
    constexpr int kNear = 4;
    const int rows = int(wanted_.size());
    const Activations& x = normed(m_.norm, rows, thread, wanted_.data());
    strips(m_.head->strips, rows, thread, [&](int i, int first, int last) {
      multiply(*m_.head, i, x, first, last, [&](int row, const f32x16* y) {
        for (int h = 0; h < 2; ++h) {
          int at = i * kStrip + kLanes * h;
          f32x16 capped = s_.logit_cap > 0
                              ? hyperbolic_tangent(y[h] * (1 / s_.logit_cap)) * s_.logit_cap
                              : y[h];
          float* to = pass.logits + size_t(row) * pass.stride + at;
          rows > kNear ? stream(to, capped) : store(to, capped);
        }
      });
    });
    if (rows > kNear) streamed();
  }
};

}  // namespace treadle
