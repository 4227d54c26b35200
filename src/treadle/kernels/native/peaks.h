// Of a row of logits the first of its largest, and log sum_i exp(z_i).
#pragma once

#include <cmath>
#include <limits>

#include "lanes.h"

namespace treadle {

struct Peak {
  int32_t token;
  float normaliser;
};

// The rest of a row, filled up with what no sum notices.
inline f32x16 some(const float* from, int count) {
  f32x16 v = all(-std::numeric_limits<float>::infinity());
  memcpy(&v, from, count * sizeof(float));
  return v;
}

inline Peak peak_of(const float* z, int count) {
  constexpr int kStep = 64;
  const int whole = count / kStep * kStep;
  f32x16 high[4];
  for (f32x16& v : high) v = all(-std::numeric_limits<float>::infinity());
  for (int i = 0; i < whole; i += kStep)
    for (int j = 0; j < 4; ++j) high[j] = largest(high[j], load<f32x16>(z + i + 16 * j));
  for (int i = whole; i < count; i += 16)
    high[0] = largest(high[0], some(z + i, count - i < 16 ? count - i : 16));
  const float top = peak(largest(largest(high[0], high[1]), largest(high[2], high[3])));
  int token = 0;
  for (; token < whole; token += kStep) {
    i32x16 found = {};
    for (int j = 0; j < 4; ++j) found |= load<f32x16>(z + token + 16 * j) == top;
    if (total(found)) break;
  }
  while (token + 1 < count && z[token] != top) ++token;
  f32x16 sums[4] = {};
  for (int i = 0; i < whole; i += kStep)
    for (int j = 0; j < 4; ++j) sums[j] += exponential(load<f32x16>(z + i + 16 * j) - top);
  for (int i = whole; i < count; i += 16)
    sums[0] += exponential(some(z + i, count - i < 16 ? count - i : 16) - top);
  return {token, top + std::log(total(sums[0] + sums[1] + (sums[2] + sums[3])))};
}

}  // namespace treadle
