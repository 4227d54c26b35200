// Sixteen lanes of float or int32, on compilers' vector types. They work on every processor; what
// has instructions of its own (products of bytes, float16) is in one file for each set of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace treadle {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

template <class V>
inline V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, f32x16 v) { memcpy(to, &v, sizeof v); }

inline float to_float(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else {
    float small = float(rest) * 0x1p-24f;
    memcpy(&bits, &small, 4);
  }
  bits |= sign;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// To the nearest float16, ties to even; what is too large becomes infinite.
inline uint16_t to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // below 2^-14 the step is 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    return sign | uint16_t(std::nearbyint(magnitude * 0x1p24f));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | uint16_t((bits >> 13) - (112u << 10));
}

}  // namespace treadle

// Each of these files gives:
//   all(x)                   x in every lane
//   halves, store_halves     sixteen float16 in memory
//   stream                   a store to 64 aligned bytes, past the caches; then `streamed`
//   bytes, signed_bytes      sixteen bytes in memory
//   dot(sum, codes, a)       to each lane, four products of codes below 128 and signed bytes
//   dot_wide, wide           the same for codes up to 255 that `wide` has made ready; it takes
//                            128 - kWideOffset off them
//   rounded, largest, peak, total, store_bytes
// and kHalves, kRows: how many vectors of rows and rows of activations the registers hold the
// sums of.
#if defined(TREADLE_AVX512)
#include "lanes_avx512.h"
#elif defined(TREADLE_AVX2)
#include "lanes_avx2.h"
#elif defined(TREADLE_NEON)
#include "lanes_neon.h"
#else
#include "lanes_portable.h"
#endif

namespace treadle {

inline f32x16 magnitude(f32x16 x) { return largest(x, -x); }

// exp(x) to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2. Beyond 88 it stays at e^88, for
// a larger n would run over into the sign.
inline f32x16 exponential(f32x16 x) {
  x = -largest(-largest(x, all(-87.0f)), all(-88.0f));
  i32x16 n = rounded(x * 1.44269504f);
  f32x16 whole = __builtin_convertvector(n, f32x16);
  f32x16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  f32x16 p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (f32x16)((i32x16)p + (n << 23));
}

inline f32x16 hyperbolic_tangent(f32x16 x) { return 1.0f - 2.0f / (1.0f + exponential(x + x)); }

}  // namespace treadle
