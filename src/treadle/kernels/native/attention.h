// Attention of up to eight queries that share a key-value head, over pages in float16.
//
// A page holds for each layer and key-value head its keys [head_dim, page], so that sixteen
// positions are one load, and its values [page, head_dim].
#pragma once

#include <algorithm>
#include <limits>

#include "lanes.h"

namespace treadle {

constexpr int kQueries = 8;

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

  // All of a page is read when its turn comes; the order of pages is none that hardware could guess.
  void prefetch(const uint16_t* half_page) const {
    for (int i = 0; i < page * head_dim; i += 32) __builtin_prefetch(half_page + i);
  }
};

struct Query {
  const float* q;  // scaled
  float* out;
  int first, last;  // positions that it sees
};

// What of a sequence some queries see: the pages from `low`, a multiple of 16, to `high`.
struct Seen {
  const Pages& pages;
  const int32_t* table;
  int low, high;
  float cap;  // of the scores; 0 for none
  float* scores;
  int room;  // from one query's scores to the next one's
};

// Scores of R queries with 16 B positions from `at` on.
template <int R, int B>
inline void score(const Query* queries, const Seen& seen, int at) {
  const Pages& pages = seen.pages;
  const uint16_t* keys = pages.keys(seen.table[at / pages.page]) + at % pages.page;
  f32x16 sums[B][R] = {};
  for (int d = 0; d < pages.head_dim; ++d) {
    f32x16 k[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) k[b] = halves(keys + d * pages.page + 16 * b);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      f32x16 q = all(queries[r].q[d]);
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) sums[b][r] += q * k[b];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b)
      store(seen.scores + r * seen.room + at - seen.low + 16 * b, sums[b][r]);
}

// Scores to exp(score - highest); 1 / their sum.
inline float soften(const Query& query, const Seen& seen, float* row) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const f32x16 never = all(-std::numeric_limits<float>::infinity());
  f32x16 high = never;
  for (int at = seen.low; at < seen.high; at += 16, row += 16) {
    f32x16 s = load<f32x16>(row);
    if (seen.cap > 0) s = hyperbolic_tangent(s * (1 / seen.cap)) * seen.cap;
    i32x16 position = lane + at;
    s = (position >= query.first) & (position < query.last) ? s : never;
    store(row, s);
    high = largest(high, s);
  }
  row -= seen.high - seen.low + 15 & ~15;
  f32x16 top = all(peak(high)), sum = {};
  for (int at = seen.low; at < seen.high; at += 16, row += 16) {
    f32x16 s = load<f32x16>(row);
    f32x16 e = s > never ? exponential(s - top) : f32x16{};
    store(row, e);
    sum += e;
  }
  return 1 / total(sum);
}

// 16 B elements, from `d` on, of the outputs of R queries.
template <int R, int B>
inline void mix(const Query* queries, const Seen& seen, const float* inverse, int d) {
  const Pages& pages = seen.pages;
  const int dim = pages.head_dim;
  f32x16 sums[R][B] = {};
  for (int at = seen.low; at < seen.high;) {
    const int place = at % pages.page, count = std::min(pages.page - place, seen.high - at);
    const uint16_t* values = pages.values(seen.table[at / pages.page]) + place * dim + d;
    const float* scores = seen.scores + at - seen.low;
    for (int i = 0; i < count; ++i) {
      f32x16 v[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) v[b] = halves(values + i * dim + 16 * b);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        f32x16 p = all(scores[r * seen.room + i]);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sums[r][b] += p * v[b];
      }
    }
    at += count;
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) store(queries[r].out + d + 16 * b, sums[r][b] * inverse[r]);
}

template <int R>
void attend_tile(const Query* queries, const Seen& seen) {
  const Pages& pages = seen.pages;
  const int page = pages.page, last = (seen.high - 1) / page;
  for (int at = seen.low; at < seen.high;) {
    const int number = at / page;
    if (at == seen.low || at % page == 0)
      pages.prefetch(number < last ? pages.keys(seen.table[number + 1])
                                   : pages.values(seen.table[seen.low / page]));
    bool two = at + 16 < seen.high && at % page + 16 < page;
    two ? score<R, 2>(queries, seen, at) : score<R, 1>(queries, seen, at);
    at += two ? 32 : 16;
  }
  for (int number = seen.low / page + 1; number <= last; ++number)
    pages.prefetch(pages.values(seen.table[number]));
  float inverse[R];
  for (int r = 0; r < R; ++r) inverse[r] = soften(queries[r], seen, seen.scores + r * seen.room);
  constexpr int kWide = R > 4 ? 2 : 4;
  int d = 0;
  for (; d + 16 * kWide <= pages.head_dim; d += 16 * kWide)
    mix<R, kWide>(queries, seen, inverse, d);
  for (; d < pages.head_dim; d += 16) mix<R, 1>(queries, seen, inverse, d);
}

// Up to kQueries queries; `scores` has room for as many rows of `room` floats, a multiple of 16.
inline void attend(int count, const Query* queries, const Pages& pages, const int32_t* table,
                   float cap, float* scores, int room) {
  static constexpr decltype(&attend_tile<1>) tiles[] = {
      attend_tile<1>, attend_tile<2>, attend_tile<3>, attend_tile<4>,
      attend_tile<5>, attend_tile<6>, attend_tile<7>, attend_tile<8>};
  int low = queries[0].first, high = 0;
  for (int i = 0; i < count; ++i) {
    low = std::min(low, queries[i].first);
    high = std::max(high, queries[i].last);
  }
  tiles[count - 1](queries, Seen{pages, table, low / 16 * 16, high, cap, scores, room});
}

}  // namespace treadle
