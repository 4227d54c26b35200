// Products of weights in few bits and activations rounded to eight.
//
//   y_o = sum_g t_g (s_og sum_i (c_ogi - z) a_gi + m_og sum_i a_gi)
//
// with codes c, scales s and minima m of the weights as in formats.h, and codes a and scale t of
// each group of 32 activations. The inner sums are of integers, and exact.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include "formats.h"
#include "memory.h"

namespace treadle {

constexpr int kAhead = 4096;  // bytes that the prefetch runs before the products

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

struct Group {
  float scale;
  float weighted;   // scale times the sum of codes
  int32_t minus;      // minus the sum of codes
  int32_t minus_low;  // and of the first half
};

// Rows of activations, rounded. `width` is in columns; those beyond the last are zero.
struct Activations {
  Buffer<int8_t> codes;
  Buffer<Group> groups;
  int width = 0;

  void reserve(int rows, int columns) {
    width = columns;
    codes.reserve(size_t(rows) * width);
    groups.reserve(size_t(rows) * (width / kGroup));
  }

  void set(int row, const float* x) {
    int8_t* code = codes.data() + size_t(row) * width;
    Group* group = groups.data() + size_t(row) * (width / kGroup);
    for (int at = 0; at < width; at += kGroup, ++group) {
      f32x16 low = load<f32x16>(x + at), high = load<f32x16>(x + at + 16);
      float most = peak(largest(magnitude(low), magnitude(high)));
      float inverse = most > 0 ? 127 / most : 0;
      i32x16 a = rounded(low * inverse), b = rounded(high * inverse);
      store_bytes(code + at, a);
      store_bytes(code + at + 16, b);
      int32_t first = total(a), sum = first + total(b);
      float scale = most / 127;
      *group = {scale, scale * float(sum), -sum, -first};
    }
  }
};

// One strip, from its half `half` on, times R rows of activations from `row` on: S vectors of sums
// for each. Beside each block, `lines` cache lines from `ahead` on are brought near.
template <Format F, int S, int R>
void multiply_tile(const uint8_t* strip, int half, int blocks, const uint8_t* ahead, int lines,
                   const Activations& x, int row, f32x16* y) {
  constexpr int kBytes = strip_block_bytes(F), kGroups = groups_of(F);
  constexpr int kZero = F == Q8_0 ? kWideOffset : zero_of(F);
  const int width = x.width, groups = width / kGroup;
  const int8_t* codes = x.codes.data() + size_t(row) * width;
  const Group* group = x.groups.data() + size_t(row) * groups;
  const uint8_t* const end = strip + size_t(blocks) * kBytes;
  f32x16 sums[S][R] = {};
  for (; strip != end; strip += kBytes) {
    for (int line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead);
    f32x16 scale[S], minimum[S];
    for (int s = 0; s < S; ++s) {
      scale[s] = halves(strip + scale_at(F) + 32 * (half + s));
      if (has_minimum(F)) minimum[s] = halves(strip + minimum_at(F) + 32 * (half + s));
    }
    for (int g = 0; g < kGroups; ++g, codes += kGroup, ++group) {
      const uint8_t* from = strip + (2 * g + half) * code_bytes(F);
      i32x16 product[S][R];
      auto start = [&](bool second) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Group& a = group[r * groups];
          i32x16 minus = {};
          if constexpr (kZero != 0) {
            minus = all(a.minus);
            if (scales_of(F) == 2) minus = second ? minus - all(a.minus_low) : all(a.minus_low);
            minus = minus * kZero;
          }
#pragma GCC unroll 2
          for (int s = 0; s < S; ++s) product[s][r] = minus;
        }
      };
      auto step = [&]<int V>() {
        u8x64 w[S];
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) w[s] = vector_of<F, V>(from + s * code_bytes(F));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int32_t four;
          memcpy(&four, codes + r * width + 4 * V, 4);
          i32x16 a = all(four);
#pragma GCC unroll 2
          for (int s = 0; s < S; ++s)
            product[s][r] = F == Q8_0 ? dot_wide(product[s][r], w[s], a)
                                      : dot(product[s][r], w[s], a);
        }
      };
      auto finish = [&](int part, bool last) {
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
          f32x16 factor = scale[s], low = minimum[s];
          if constexpr (two_level(F)) {
            const uint8_t* at = strip + small_scale_at(F) + 16 * (half + s) +
                                (g * scales_of(F) + part) * kStrip;
            factor *= __builtin_convertvector(F == Q6_K ? signed_bytes(at) : bytes(at), f32x16);
            if constexpr (has_minimum(F)) {
              at = strip + small_minimum_at(F) + 16 * (half + s) + g * kStrip;
              low *= -__builtin_convertvector(bytes(at), f32x16);
            }
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const Group& a = group[r * groups];
            sums[s][r] += __builtin_convertvector(product[s][r], f32x16) * (factor * all(a.scale));
            if (has_minimum(F) && last) sums[s][r] += low * all(a.weighted);
          }
        }
      };
      start(false);
      step.template operator()<0>(), step.template operator()<1>();
      step.template operator()<2>(), step.template operator()<3>();
      if (scales_of(F) == 2) finish(0, false), start(true);
      step.template operator()<4>(), step.template operator()<5>();
      step.template operator()<6>(), step.template operator()<7>();
      finish(scales_of(F) - 1, true);
    }
  }
  for (int s = 0; s < S; ++s)
    for (int r = 0; r < R; ++r) y[2 * r + half + s] = sums[s][r];
}

typedef void (*Tile)(const uint8_t*, int, int, const uint8_t*, int, const Activations&, int,
                     f32x16*);

template <Format F, size_t... R>
inline Tile tile_of(int rows, std::index_sequence<R...>) {
  static constexpr Tile tiles[] = {multiply_tile<F, kHalves, int(R) + 1>...};
  return tiles[rows - 1];
}

template <Format F>
inline Tile tile_of(int rows) {
  return tile_of<F>(rows, std::make_index_sequence<kRows>());
}

class Matrix {
 public:
  const Format format;
  const int rows, columns, strips, blocks;

  // From a file's blocks, row by row.
  Matrix(std::shared_ptr<Arena> arena, Format format, int rows, int columns, const uint8_t* from)
      : format(format),
        rows(rows),
        columns(columns),
        strips(divide_up(rows, kStrip)),
        blocks(columns / (groups_of(format) * kGroup)),
        arena_(std::move(arena)),
        data_(arena_->take(bytes())) {
    memset(data_, 0, bytes());
    Unpacked block;
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < blocks; ++i, from += stored_bytes(format)) {
        unpack(format, from, block);
        put(format, block, row % kStrip, block_of(row, i));
      }
  }

  // What a matrix takes of an arena.
  static size_t bytes_of(Format format, int rows, int columns) {
    return size_t(divide_up(rows, kStrip)) * (columns / (groups_of(format) * kGroup)) *
           strip_block_bytes(format);
  }

  size_t bytes() const { return strips * strip_bytes(); }
  size_t strip_bytes() const { return size_t(blocks) * strip_block_bytes(format); }
  const uint8_t* strip(int i) const { return data_ + i * strip_bytes(); }

  // y[2 r + h]: half strip h times row `row` + r. See `multiply_tile` for `ahead` and `lines`.
  void multiply(int i, const uint8_t* ahead, int lines, const Activations& x, int row, int count,
                f32x16* y) const {
    for (int half = 0; half < 2; half += kHalves)
      tile(count)(strip(i), half, blocks, ahead, lines, x, row, y);
  }

  // One row as floats.
  void unpack_row(int row, float* y) const;

 private:
  const std::shared_ptr<Arena> arena_;
  uint8_t* const data_;

  uint8_t* block_of(int row, int i) const {
    return data_ + row / kStrip * strip_bytes() + size_t(i) * strip_block_bytes(format);
  }

  Tile tile(int count) const {
    switch (format) {
      case Q4_0: return tile_of<Q4_0>(count);
      case Q4_1: return tile_of<Q4_1>(count);
      case Q5_0: return tile_of<Q5_0>(count);
      case Q5_1: return tile_of<Q5_1>(count);
      case Q8_0: return tile_of<Q8_0>(count);
      case Q4_K: return tile_of<Q4_K>(count);
      case Q5_K: return tile_of<Q5_K>(count);
      case Q6_K: return tile_of<Q6_K>(count);
    }
    return nullptr;
  }
};

inline void Matrix::unpack_row(int row, float* y) const {
  const int place = row % kStrip, half = place / kLanes, lane = place % kLanes;
  const int parts = scales_of(format), bits = bits_of(format);
  auto half_at = [](const uint8_t* from) {
    uint16_t number;
    memcpy(&number, from, 2);
    return to_float(number);
  };
  for (int i = 0; i < blocks; ++i) {
    const uint8_t* block = block_of(row, i);
    float scale = half_at(block + scale_at(format) + 2 * place), minimum = 0;
    if (has_minimum(format)) minimum = half_at(block + minimum_at(format) + 2 * place);
    for (int g = 0; g < groups_of(format); ++g) {
      const uint8_t* codes = block + (2 * g + half) * code_bytes(format) + 4 * lane;
      const uint8_t* scales = block + small_scale_at(format) + g * parts * kStrip + place;
      const uint8_t* minima = block + small_minimum_at(format) + g * kStrip + place;
      for (int j = 0; j < kGroup; ++j, ++y) {
        int v = j / 4, code = codes[64 * (bits == 8 ? v : v % 4) + j % 4];
        if (bits < 8) code = code >> (v < 4 ? 0 : 4) & 15;
        if (bits == 5) code |= (codes[256 + j % 4] >> v & 1) << 4;
        if (bits == 6) code |= (codes[256 + v / 4 * 64 + j % 4] >> v % 4 * 2 & 3) << 4;
        float factor = scale, low = minimum;
        if (format == Q6_K) factor *= float(int8_t(scales[j / 16 * kStrip]));
        if (two_level(format) && has_minimum(format))
          factor *= float(*scales), low *= -float(*minima);
        *y = factor * float(code - zero_of(format)) + low;
      }
    }
  }
}

// The rows of activations that one product takes at a time.
constexpr int kBlock = 64;

// Strip `i` times rows [first, last) of `x`; `finish(row, halves)` takes each result. Meanwhile what
// lies behind is brought near: a piece of the next strip with each tile of rows.
template <class Finish>
inline void multiply(const Matrix& w, int i, const Activations& x, int first, int last,
                     Finish finish) {
  f32x16 y[2 * kRows];
  const int tiles = divide_up(last - first, kRows);
  const int lines = divide_up(strip_block_bytes(w.format) / 64, tiles);
  const uint8_t* ahead = tiles == 1 ? w.strip(i) + kAhead : w.strip(i + 1);
  for (int t = 0; t < tiles; ++t, ahead += lines * w.blocks * 64) {
    int row = first + (last - first) * t / tiles;
    int count = first + (last - first) * (t + 1) / tiles - row;
    w.multiply(i, ahead, lines, x, row, count, y);
    for (int r = 0; r < count; ++r) finish(row + r, y + 2 * r);
  }
}

}  // namespace treadle
