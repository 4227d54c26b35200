// Weights in 4 or 8 bits, activations in 8: products of rows of 32-weight groups.
//
//   y_o = sum_g s_og t_g sum_i (c_ogi - z) a_gi          Q4_0 (z = 8), Q8_0 (z = 128)
//   y_o = sum_g s_og t_g sum_i c_ogi a_gi + m_og t_g sum_i a_gi                 Q4_1
//
// with unsigned codes c and scales s (and minima m) of the weight, signed codes a and scales t of
// the activations. Sixteen rows make a strip, whose groups lie in pairs: the codes of both, 16 + 16
// scales, and for Q4_1 16 + 16 minima in float16. In a group of 8 bits, byte 64 k + 4 r + j is row
// r, input 4 k + j, which is the order that the dot product of bytes reads; with 4 bits, byte
// 64 k + 4 r + j has input 4 k + j in its low and 16 + 4 k + j in its high half.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "memory.h"

namespace treadle {

enum Format { Q4_0, Q4_1, Q8_0 };

constexpr int kGroup = 32, kStrip = 16, kTile = 8;
constexpr int kAhead = 4096;  // bytes that the prefetch runs before the products

constexpr int group_bytes(Format f) { return f == Q8_0 ? 512 : 256; }
constexpr int pair_bytes(Format f) { return 2 * group_bytes(f) + (f == Q4_1 ? 128 : 64); }
constexpr int block_bytes(Format f) { return f == Q4_0 ? 18 : f == Q4_1 ? 20 : 34; }

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

struct Group {
  float scale;
  float weighted;  // scale times the sum of codes
  int32_t minus;   // minus the sum of codes
  int32_t unused;
};

// Rows of activations, rounded.
struct Activations {
  Buffer<int8_t> codes;
  Buffer<Group> groups;
  int width = 0;  // in columns, a multiple of a pair of groups

  void reserve(int rows, int columns) {
    width = divide_up(columns, 2 * kGroup) * 2 * kGroup;
    codes.reserve(size_t(rows) * width);
    groups.reserve(size_t(rows) * (width / kGroup));
  }

  void set(int row, const float* x, int columns) {
    int8_t* code = codes.data() + size_t(row) * width;
    Group* group = groups.data() + size_t(row) * (width / kGroup);
    for (int at = 0; at < width; at += kGroup, ++group) {
      if (at >= columns) {
        memset(code + at, 0, kGroup);
        *group = {};
        continue;
      }
      f32x16 low = load<f32x16>(x + at), high = load<f32x16>(x + at + 16);
      float most = peak(largest(magnitude(low), magnitude(high)));
      float inverse = most > 0 ? 127 / most : 0;
      i32x16 a = rounded(low * inverse), b = rounded(high * inverse);
      store_bytes(code + at, a);
      store_bytes(code + at + 16, b);
      int32_t sum = total(a + b);
      float scale = most / 127;
      *group = {scale, scale * float(sum), -sum, 0};
    }
  }
};

template <Format F>
inline void unpack(const uint8_t* group, u8x64 (&codes)[8]) {
  if (F == Q8_0) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) codes[k] = load<u8x64>(group + 64 * k);
  } else {
    typedef uint16_t u16x32 __attribute__((vector_size(64)));
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      u8x64 both = load<u8x64>(group + 64 * k);
      codes[k] = both & 15;
      codes[k + 4] = (u8x64)((u16x32)both >> 4) & 15;
    }
  }
}

// One strip times R rows of activations, from `row` on.
template <Format F, int R>
void multiply_tile(const uint8_t* strip, int pairs, const Activations& x, int row, f32x16* y) {
  const int width = x.width, groups = width / kGroup;
  const int8_t* codes = x.codes.data() + size_t(row) * width;
  const Group* group = x.groups.data() + size_t(row) * groups;
  f32x16 sums[R] = {};
  for (int pair = 0; pair < pairs; ++pair, strip += pair_bytes(F)) {
    for (int line = 0; line < pair_bytes(F); line += 64)
      __builtin_prefetch(strip + kAhead + line);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, codes += kGroup, ++group) {
      u8x64 w[8];
      unpack<F>(strip + half * group_bytes(F), w);
      const uint8_t* tail = strip + 2 * group_bytes(F) + 32 * half;
      f32x16 scale = halves(tail);
      f32x16 minimum = F == Q4_1 ? halves(tail + 64) : f32x16{};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Group& g = group[r * groups];
        i32x16 product = F == Q4_1 ? i32x16{} : all(g.minus) << (F == Q4_0 ? 3 : 7);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
          int32_t four;
          memcpy(&four, codes + r * width + 4 * k, 4);
          product = dot(product, w[k], all(four));
        }
        sums[r] += __builtin_convertvector(product, f32x16) * (scale * all(g.scale));
        if (F == Q4_1) sums[r] += minimum * all(g.weighted);
      }
    }
  }
  for (int r = 0; r < R; ++r) y[r] = sums[r];
}

typedef void (*Tile)(const uint8_t*, int, const Activations&, int, f32x16*);

template <Format F>
inline Tile tile_of(int rows) {
  static constexpr Tile tiles[kTile] = {multiply_tile<F, 1>, multiply_tile<F, 2>,
                                        multiply_tile<F, 3>, multiply_tile<F, 4>,
                                        multiply_tile<F, 5>, multiply_tile<F, 6>,
                                        multiply_tile<F, 7>, multiply_tile<F, 8>};
  return tiles[rows - 1];
}

class Matrix {
 public:
  const Format format;
  const int rows, columns, strips, pairs;

  // From rows of GGUF blocks.
  Matrix(Format format, int rows, int columns, const uint8_t* blocks)
      : format(format),
        rows(rows),
        columns(columns),
        strips(divide_up(rows, kStrip)),
        pairs(divide_up(columns, 2 * kGroup)),
        data_(strips * strip_bytes() + kAhead) {
    memset(data_.data(), 0, strips * strip_bytes() + kAhead);
    const int groups = columns / kGroup;
    for (int row = 0; row < rows; ++row)
      for (int group = 0; group < groups; ++group)
        put(row, group, blocks + (size_t(row) * groups + group) * block_bytes(format));
  }

  size_t strip_bytes() const { return size_t(pairs) * pair_bytes(format); }

  void multiply(int strip, const Activations& x, int row, int count, f32x16* y) const {
    const uint8_t* from = data_.data() + strip * strip_bytes();
    Tile tile = format == Q4_0   ? tile_of<Q4_0>(count)
                : format == Q4_1 ? tile_of<Q4_1>(count)
                                 : tile_of<Q8_0>(count);
    tile(from, pairs, x, row, y);
  }

  // One row as floats.
  void unpack_row(int row, float* y) const {
    for (int group = 0; group < columns / kGroup; ++group) {
      const uint8_t* codes = group_of(row, group);
      const uint8_t* tail = tail_of(row, group);
      float scale = half_at(tail), minimum = format == Q4_1 ? half_at(tail + 64) : 0;
      for (int i = 0; i < kGroup; ++i) {
        int code = format == Q8_0 ? codes[64 * (i / 4) + i % 4] - 128
                                  : (codes[64 * (i % 16 / 4) + i % 4] >> (i < 16 ? 0 : 4) & 15) -
                                        (format == Q4_0 ? 8 : 0);
        y[group * kGroup + i] = scale * float(code) + minimum;
      }
    }
  }

 private:
  Buffer<uint8_t> data_;

  static float half_at(const uint8_t* from) {
    uint16_t bits;
    memcpy(&bits, from, 2);
    return to_float(bits);
  }

  uint8_t* group_of(int row, int group) const {
    return data_.data() + row / kStrip * strip_bytes() + group / 2 * pair_bytes(format) +
           group % 2 * group_bytes(format) + row % kStrip * 4;
  }

  uint8_t* tail_of(int row, int group) const {
    return data_.data() + row / kStrip * strip_bytes() + group / 2 * pair_bytes(format) +
           2 * group_bytes(format) + group % 2 * 32 + row % kStrip * 2;
  }

  // GGUF keeps weights i and i + 16 of a block in one byte of 4-bit formats.
  void put(int row, int group, const uint8_t* block) const {
    uint8_t* codes = group_of(row, group);
    uint8_t* tail = tail_of(row, group);
    memcpy(tail, block, 2);
    if (format == Q4_1) memcpy(tail + 64, block + 2, 2);
    const uint8_t* from = block + (format == Q4_1 ? 4 : 2);
    if (format == Q8_0)
      for (int i = 0; i < kGroup; ++i) codes[64 * (i / 4) + i % 4] = from[i] ^ 0x80;
    else
      for (int i = 0; i < 16; ++i) codes[64 * (i / 4) + i % 4] = from[i];
  }
};

// Strips [first, last) times all rows of `x`; `finish(strip, row, sums)` takes each result. Rows
// go in blocks whose codes stay in the second cache while the strips pass by.
template <class Finish>
void multiply(const Matrix& w, int first, int last, const Activations& x, int rows,
              Finish finish) {
  constexpr int kBlock = 64;
  f32x16 y[kTile];
  for (int block = 0; block < rows; block += kBlock)
    for (int strip = first; strip < last; ++strip)
      for (int row = block; row < std::min(block + kBlock, rows); row += kTile) {
        int count = std::min(kTile, rows - row);
        w.multiply(strip, x, row, count, y);
        for (int r = 0; r < count; ++r) finish(strip, row + r, y[r]);
      }
}

}  // namespace treadle
