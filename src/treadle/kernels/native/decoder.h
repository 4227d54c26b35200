// One pass of a decoder: all layers in one parallel region, six barriers a layer.
#pragma once

#include <memory>
#include <vector>

#include "activation.h"
#include "attention.h"
#include "model.h"
#include "peaks.h"
#include "pool.h"
#include "scratch.h"

namespace treadle {

class Decoder {
 public:
  Decoder(const Shape& shape, int threads, Model model)
      : s_(shape), pool_(threads), m_(std::move(model)), own_(new Own[threads]) {}

  bool alive() const { return pool_.alive(); }

  void run(const Pass& pass) {
    p_.lay_out(s_, pass, m_.layers[0].mixer_after != nullptr);
    for (int t = 0; t < pool_.size; ++t) own_[t].reserve(s_);
    pool_.run([&](int thread) { work(pass, thread); });
  }

  // Of each of `rows` rows of logits.
  void peaks(const float* logits, int rows, size_t stride, int32_t* tokens, float* normalisers) {
    pool_.run([&](int thread) {
      pool_.each(thread, rows, [&](int row) {
        Peak found = peak_of(logits + row * stride, s_.vocab);
        tokens[row] = found.token, normalisers[row] = found.normaliser;
      });
    });
  }

 private:
  const Shape s_;
  Pool pool_;
  const Model m_;
  std::unique_ptr<Own[]> own_;
  Scratch p_;

  float* turn_of(int row, int rope) const {
    return p_.turns.data() + (size_t(row) * s_.ropes + rope) * s_.head_dim;
  }

  void work(const Pass& pass, int thread) {
    const int rows = int(p_.rows.size());
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
      const int mixed = s_.mixed();
      add(l.out, l.mixer_after, rounded_rows(p_.mixed.data(), mixed, mixed, thread), thread);
      gate(l, normed(l.ffn_norm, rows, thread), thread);
      pool_.barrier();
      const int width = s_.hidden_width();
      add(l.down, l.ffn_after, rounded_rows(p_.hidden.data(), s_.hidden, width, thread), thread);
    }
    if (p_.wanted.empty()) return;
    pass.hidden ? hidden(pass, thread) : logits(pass, thread);
  }

  // Embeddings, and the rotations of each position.
  void begin(const Pass& pass, int thread) {
    auto [first, last] = pool_.share(int(p_.rows.size()), thread);
    for (int row = first; row < last; ++row) {
      float* x = p_.x.data() + size_t(row) * s_.dim;
      m_.embedding->unpack_row(pass.tokens[row], x);
      for (int d = 0; d < s_.dim; ++d) x[d] *= s_.embedding_scale;
      for (int rope = 0; rope < s_.ropes; ++rope) {
        const Rope& r = m_.ropes[rope];
        float* turn = turn_of(row, rope);
        for (int i = 0; i < r.count; ++i) {
          float angle = float(p_.rows[row].position) * r.frequencies[i];
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
    if (thread == 0) p_.shared.reserve(rows, columns);
    pool_.barrier();
    auto [first, last] = pool_.share(rows, thread);
    for (int row = first; row < last; ++row) fill(p_.shared, row);
    pool_.barrier();
    return p_.shared;
  }

  const Activations& rounded_rows(const float* from, int columns, int stride, int thread) {
    return prepared(int(p_.rows.size()), columns, thread, [=](Activations& to, int row) {
      to.set(row, from + size_t(row) * stride);
    });
  }

  const Activations& normed(const float* gain, int rows, int thread,
                            const int* which = nullptr) {
    float* y = own_[thread].normed.data();
    return prepared(rows, s_.dim, thread, [=, this](Activations& to, int row) {
      norm(p_.x.data() + size_t(which ? which[row] : row) * s_.dim, gain, s_.dim, s_.eps, y);
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
    strips(q + 2 * kv, int(p_.rows.size()), thread, [&](int i, int first, int last) {
      if (i < q) return product(l.q, i, x, first, last, p_.q.data(), s_.q_width());
      if (i < q + kv) return product(l.k, i - q, x, first, last, p_.k.data(), s_.kv_width());
      product(l.v, i - q - kv, x, first, last, p_.v.data(), s_.kv_width());
    });
  }

  // Turns queries and keys, and stores keys and values.
  void turn(const Pass& pass, int layer, int thread) {
    const Layer& l = m_.layers[layer];
    const int dim = s_.head_dim, heads = s_.heads + s_.kv_heads;
    auto [first, last] = pool_.share(int(p_.rows.size()) * heads, thread);
    for (int i = first; i < last; ++i) {
      const int row = i / heads, head = i % heads, kv = head - s_.heads;
      if (kv < 0) {
        float* q = p_.q.data() + size_t(row) * s_.q_width() + head * dim;
        if (l.q_norm) norm(q, l.q_norm, dim, s_.eps, q);
        rotate(q, row, l.rope, s_.scale);
        continue;
      }
      float* k = p_.k.data() + size_t(row) * s_.kv_width() + kv * dim;
      if (l.k_norm) norm(k, l.k_norm, dim, s_.eps, k);
      rotate(k, row, l.rope, 1);
      auto [sequence, position] = p_.rows[row];
      int page = pass.tables[pass.table_at[sequence] + position / s_.page];
      pages_of(pass, layer, kv).put(page, position % s_.page, k,
                              p_.v.data() + size_t(row) * s_.kv_width() + kv * dim);
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
    pool_.each(thread, int(p_.tasks.size()), [&](int at) {
      const Scratch::Task& task = p_.tasks[at];
      Query queries[kQueries];
      for (int i = 0; i < task.count; ++i) {
        int row = task.row + (task.first + i) / group;
        int head = task.kv_head * group + (task.first + i) % group;
        int last = p_.rows[row].position + 1;
        queries[i] = {p_.q.data() + size_t(row) * s_.q_width() + head * dim,
                      p_.mixed.data() + (size_t(row) * s_.heads + head) * dim,
                      window ? std::max(0, last - window) : 0, last};
      }
      attend(task.count, queries, pages_of(pass, layer, task.kv_head),
             pass.tables + pass.table_at[task.sequence], s_.score_cap,
             own_[thread].scores.data(), s_.room());
    });
  }

  // x += W y, normed where the family does so.
  void add(const Linear& l, const float* after_norm, const Activations& y, int thread) {
    const int rows = int(p_.rows.size());
    if (after_norm) {
      strips(l.w->strips, rows, thread, [&](int i, int first, int last) {
        product(l, i, y, first, last, p_.branch.data(), s_.dim);
      });
      pool_.barrier();
      auto [first, last] = pool_.share(rows, thread);
      for (int row = first; row < last; ++row) {
        float* branch = p_.branch.data() + size_t(row) * s_.dim;
        float* x = p_.x.data() + size_t(row) * s_.dim;
        norm(branch, after_norm, s_.dim, s_.eps, branch);
        for (int d = 0; d < s_.dim; ++d) x[d] += branch[d];
      }
    } else {
      strips(l.w->strips, rows, thread, [&](int i, int first, int last) {
        multiply(*l.w, i, y, first, last, [&](int row, const f32x16* sums) {
          for (int h = 0; h < 2; ++h) {
            int at = i * kStrip + kLanes * h;
            float* x = p_.x.data() + size_t(row) * s_.dim + at;
            f32x16 sum = load<f32x16>(x) + sums[h];
            store(x, l.bias ? sum + load<f32x16>(l.bias + at) : sum);
          }
        });
      });
    }
    pool_.barrier();
  }

  void gate(const Layer& l, const Activations& x, int thread) {
    const int width = s_.hidden_width();
    strips(l.gate.w->strips, int(p_.rows.size()), thread, [&](int i, int first, int last) {
      product(l.gate, i, x, first, last, p_.hidden.data(), width);
      multiply(*l.up.w, i, x, first, last, [&](int row, const f32x16* up) {
        for (int h = 0; h < 2; ++h) {
          int at = i * kStrip + kLanes * h;
          float* to = p_.hidden.data() + size_t(row) * width + at;
          f32x16 y = l.up.bias ? up[h] + load<f32x16>(l.up.bias + at) : up[h];
          store(to, activated(load<f32x16>(to), s_.activation) * y);
        }
      });
    });
  }

  void hidden(const Pass& pass, int thread) {
    auto [first, last] = pool_.share(int(p_.wanted.size()), thread);
    for (int row = first; row < last; ++row)
      norm(p_.x.data() + size_t(p_.wanted[row]) * s_.dim, m_.norm, s_.dim, s_.eps,
           pass.hidden + size_t(row) * s_.dim);
  }

  void logits(const Pass& pass, int thread) {
    // Few rows stay in the cache for whoever reads them; many would have to be fetched into it
    // before they are overwritten.
    constexpr int kNear = 4;
    const int rows = int(p_.wanted.size());
    const Activations& x = normed(m_.norm, rows, thread, p_.wanted.data());
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
