// Attention of up to eight queries that share a key-value head, over pages in float16.
//
// A page holds for each layer and key-value head its keys [head_dim, page], so that sixteen
// positions are one load, and its values [page, head_dim].
#pragma once

#include <algorithm>
#include <limits>

#include "lanes.h"

namespace treadle {

// The pages of one layer and one key-value head.
struct Pages {
  uint16_t* start;
  size_t stride;  // from page to page
  int page, head_dim;

  uint16_t* keys(int number) const { return start + number * stride; }
  uint16_t* values(int number) const { return keys(number) + page * head_dim; }

  void put(int number, int place, const float* k, const float* v) const {
    uint16_t* column = keys(number) + place;
    for (int d = 0; d < head_dim; d += 16) {
      uint16_t part[16];
      store_halves(part, load<f32x16>(k + d));
      for (int i = 0; i < 16; ++i) column[(d + i) * page] = part[i];
      store_halves(values(number) + place * head_dim + d, load<f32x16>(v + d));
    }
  }
};

struct Query {
  const float* q;  // scaled
  float* out;
  int seen;  // positions that it sees
};

// R queries; `scores` has room for R rows of `room` floats, a multiple of 16.
template <int R>
void attend_tile(const Query* queries, const Pages& pages, const int32_t* table, float* scores,
                 int room) {
  const int dim = pages.head_dim, page = pages.page;
  int most = 0;
  for (int r = 0; r < R; ++r) most = std::max(most, queries[r].seen);
  for (int at = 0; at < most; at += 16) {
    const uint16_t* keys = pages.keys(table[at / page]) + at % page;
    f32x16 sums[R] = {};
    for (int d = 0; d < dim; ++d) {
      f32x16 k = halves(keys + d * page);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r] += all(queries[r].q[d]) * k;
    }
    for (int r = 0; r < R; ++r) store(scores + r * room + at, sums[r]);
  }
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 never = all(-std::numeric_limits<float>::infinity());
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * room;
    f32x16 high = never;
    for (int at = 0; at < most; at += 16) {
      f32x16 s = load<f32x16>(row + at);
      s = lane + at < queries[r].seen ? s : never;
      store(row + at, s);
      high = largest(high, s);
    }
    f32x16 top = all(peak(high)), sum = {};
    for (int at = 0; at < most; at += 16) {
      f32x16 s = load<f32x16>(row + at);
      f32x16 e = lane + at < queries[r].seen ? exponential(s - top) : f32x16{};
      store(row + at, e);
      sum += e;
    }
    inverse[r] = 1 / total(sum);
  }
  for (int d = 0; d < dim; d += 16) {
    f32x16 sums[R] = {};
    for (int at = 0; at < most; at += page) {
      const uint16_t* values = pages.values(table[at / page]) + d;
      int count = std::min(page, most - at);
      for (int i = 0; i < count; ++i) {
        f32x16 v = halves(values + i * dim);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] += all(scores[r * room + at + i]) * v;
      }
    }
    for (int r = 0; r < R; ++r) store(queries[r].out + d, sums[r] * inverse[r]);
  }
}

inline void attend(int count, const Query* queries, const Pages& pages, const int32_t* table,
                   float* scores, int room) {
  static constexpr decltype(&attend_tile<1>) tiles[] = {
      attend_tile<1>, attend_tile<2>, attend_tile<3>, attend_tile<4>,
      attend_tile<5>, attend_tile<6>, attend_tile<7>, attend_tile<8>};
  tiles[count - 1](queries, pages, table, scores, room);
}

}  // namespace treadle
