// The formats of weights, as GGUF has them and as they lie here.
//
//   Q4_0 Q5_0 Q8_0    w = s (c - z)             a group of 32 weights with a scale in float16
//   Q4_1 Q5_1         w = s c + m               and a minimum
//   Q4_K Q5_K         w = d s c - e m           8 groups with d and e in float16, s and m in 6 bits
//   Q6_K              w = d s (c - 32)          8 groups with d, and s in 8 bits for each half group
//
// Thirty-two rows make a strip, in two halves of sixteen. A block of a strip is one group, or eight
// with two-level scales: of each group and half the codes, then of each row the float16 numbers,
// then of each group the small ones of each row. Nothing is rounded on the way.
//
// Input 4 v + j of half row r is in byte 4 r + j of vector v, which is the order that the dot
// product of bytes reads. Of the eight vectors, v and v + 4 share one in memory: the low four bits
// of their codes. Fifth bits follow in one vector, bit v for vector v; fifth and sixth bits in two,
// bits 2 (v % 4) and up of vector v / 4.
#pragma once

#include "lanes.h"

namespace treadle {

enum Format { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

constexpr int kGroup = 32, kLanes = 16, kStrip = 32;

constexpr bool two_level(Format f) { return f == Q4_K || f == Q5_K || f == Q6_K; }
constexpr bool has_minimum(Format f) { return f == Q4_1 || f == Q5_1 || f == Q4_K || f == Q5_K; }
constexpr int groups_of(Format f) { return two_level(f) ? 8 : 1; }
constexpr int scales_of(Format f) { return f == Q6_K ? 2 : 1; }  // of a group
constexpr int bits_of(Format f) {
  return f == Q8_0 ? 8 : f == Q6_K ? 6 : f == Q5_0 || f == Q5_1 || f == Q5_K ? 5 : 4;
}

// The code of zero, where there is one for all groups.
constexpr int zero_of(Format f) {
  return f == Q4_0 ? 8 : f == Q5_0 ? 16 : f == Q8_0 ? 128 : f == Q6_K ? 32 : 0;
}

// Bytes of a row's block in a file.
constexpr int stored_bytes(Format f) {
  switch (f) {
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case Q8_0: return 34;
    case Q4_K: return 144;
    case Q5_K: return 176;
    case Q6_K: return 210;
  }
  return 0;
}

// Bytes of the codes of sixteen rows' group, and where a strip's block has its parts.
constexpr int code_bytes(Format f) { return 64 * bits_of(f); }
constexpr int scale_at(Format f) { return groups_of(f) * 2 * code_bytes(f); }
constexpr int minimum_at(Format f) { return scale_at(f) + 2 * kStrip; }
constexpr int small_scale_at(Format f) {
  return has_minimum(f) ? minimum_at(f) + 2 * kStrip : minimum_at(f);
}
constexpr int small_minimum_at(Format f) {
  return small_scale_at(f) + (two_level(f) ? groups_of(f) * scales_of(f) * kStrip : 0);
}
constexpr int strip_block_bytes(Format f) {
  return small_minimum_at(f) + (two_level(f) && has_minimum(f) ? groups_of(f) * kStrip : 0);
}

template <int by>
inline u8x64 moved(u8x64 v) {
  return by < 0 ? (u8x64)((u16x32)v >> (by < 0 ? -by : 0)) : (u8x64)((u16x32)v << (by < 0 ? 0 : by));
}

// Vector v of the codes of sixteen rows' group.
template <Format F, int V>
inline u8x64 vector_of(const uint8_t* codes) {
  if constexpr (F == Q8_0) {
    return wide(load<u8x64>(codes + 64 * V));
  } else {
    u8x64 both = load<u8x64>(codes + 64 * (V % 4));
    u8x64 low = V < 4 ? both & 15 : moved<-4>(both) & 15;
    if constexpr (bits_of(F) == 5) return low | (moved<4 - V>(load<u8x64>(codes + 256)) & 16);
    if constexpr (bits_of(F) == 6)
      return low | (moved<4 - V % 4 * 2>(load<u8x64>(codes + 256 + V / 4 * 64)) & 48);
    return low;
  }
}

// What one row's block says.
struct Unpacked {
  uint8_t codes[8 * kGroup];
  uint16_t scale, minimum;
  uint8_t small_scales[16], small_minima[8];
};

inline void unpack_small(Format f, const uint8_t* from, Unpacked& to) {
  const bool has_low = has_minimum(f);
  memcpy(&to.scale, from, 2);
  if (has_low) memcpy(&to.minimum, from + 2, 2);
  const uint8_t* at = from + (has_low ? 4 : 2);
  if (f == Q8_0) {
    for (int i = 0; i < kGroup; ++i) to.codes[i] = at[i] ^ 0x80;
    return;
  }
  uint32_t fifth = 0;
  if (bits_of(f) == 5) memcpy(&fifth, at, 4), at += 4;
  for (int i = 0; i < 16; ++i) {
    to.codes[i] = (at[i] & 15) | (fifth >> i & 1) << 4;
    to.codes[i + 16] = at[i] >> 4 | (fifth >> (i + 16) & 1) << 4;
  }
}

// Q4_K and Q5_K.
inline void unpack_affine(Format f, const uint8_t* from, Unpacked& to) {
  memcpy(&to.scale, from, 2);
  memcpy(&to.minimum, from + 2, 2);
  const uint8_t* packed = from + 4;
  for (int j = 0; j < 4; ++j) {
    to.small_scales[j] = packed[j] & 63;
    to.small_minima[j] = packed[4 + j] & 63;
    to.small_scales[4 + j] = (packed[8 + j] & 15) | packed[j] >> 6 << 4;
    to.small_minima[4 + j] = packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4;
  }
  const uint8_t *fifth = from + 16, *at = from + (f == Q5_K ? 48 : 16);
  for (int group = 0; group < 8; ++group)
    for (int i = 0; i < kGroup; ++i) {
      int code = at[group / 2 * 32 + i] >> (group % 2 ? 4 : 0) & 15;
      if (f == Q5_K) code |= (fifth[i] >> group & 1) << 4;
      to.codes[group * kGroup + i] = code;
    }
}

inline void unpack_q6(const uint8_t* from, Unpacked& to) {
  const uint8_t *low = from, *high = from + 128;
  for (int i = 0; i < 256; ++i) {
    int half = i / 128, group = i / 32 % 4, place = i % 32;
    int code = low[64 * half + group % 2 * 32 + place] >> (group < 2 ? 0 : 4) & 15;
    to.codes[i] = code | (high[32 * half + place] >> 2 * group & 3) << 4;
  }
  memcpy(to.small_scales, from + 192, 16);
  memcpy(&to.scale, from + 208, 2);
}

inline void unpack(Format f, const uint8_t* from, Unpacked& to) {
  if (!two_level(f)) return unpack_small(f, from, to);
  f == Q6_K ? unpack_q6(from, to) : unpack_affine(f, from, to);
}

// A row's block into its place in a strip's block of zeros.
inline void put(Format f, const Unpacked& from, int row, uint8_t* block) {
  const int half = row / kLanes, lane = row % kLanes, groups = groups_of(f);
  for (int group = 0; group < groups; ++group) {
    uint8_t* to = block + (2 * group + half) * code_bytes(f) + 4 * lane;
    for (int v = 0; v < 8; ++v) {
      uint32_t four, there;
      memcpy(&four, from.codes + group * kGroup + 4 * v, 4);
      auto join = [&](uint8_t* at, uint32_t bits) {
        memcpy(&there, at, 4);
        there |= bits;
        memcpy(at, &there, 4);
      };
      if (f == Q8_0) {
        memcpy(to + 64 * v, &four, 4);
        continue;
      }
      join(to + 64 * (v % 4), (four & 0x0f0f0f0f) << (v < 4 ? 0 : 4));
      if (bits_of(f) == 5) join(to + 256, (four >> 4 & 0x01010101) << v);
      if (bits_of(f) == 6) join(to + 256 + v / 4 * 64, (four >> 4 & 0x03030303) << v % 4 * 2);
    }
  }
  memcpy(block + scale_at(f) + 2 * row, &from.scale, 2);
  if (has_minimum(f)) memcpy(block + minimum_at(f) + 2 * row, &from.minimum, 2);
  if (!two_level(f)) return;
  for (int i = 0; i < groups * scales_of(f); ++i)
    block[small_scale_at(f) + i * kStrip + row] = from.small_scales[i];
  if (has_minimum(f))
    for (int i = 0; i < groups; ++i)
      block[small_minimum_at(f) + i * kStrip + row] = from.small_minima[i];
}

}  // namespace treadle
