// Sixteen lanes of float or int32, on compilers' vector types. They work on every processor; what
// has an instruction of its own on AVX-512 (products of bytes, float16) is written twice.
// Compile with -DTREADLE_PORTABLE to have the portable half on any machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && \
    !defined(TREADLE_PORTABLE)
#define TREADLE_AVX512 1
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace treadle {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
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

#ifdef TREADLE_AVX512

inline f32x16 all(float x) { return (f32x16)_mm512_set1_ps(x); }
inline i32x16 all(int32_t x) { return (i32x16)_mm512_set1_epi32(x); }

inline f32x16 halves(const void* from) {
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}

inline void store_halves(uint16_t* to, f32x16 v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

// In each lane, the sum of four products of unsigned and signed bytes is added to `sum`.
inline i32x16 dot(i32x16 sum, u8x64 unsigned_bytes, i32x16 signed_bytes) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes,
                                     (__m512i)signed_bytes);
}

inline i32x16 rounded(f32x16 x) { return (i32x16)_mm512_cvtps_epi32((__m512)x); }
inline f32x16 largest(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
inline float peak(f32x16 x) { return _mm512_reduce_max_ps((__m512)x); }
inline float total(f32x16 x) { return _mm512_reduce_add_ps((__m512)x); }
inline int32_t total(i32x16 x) { return _mm512_reduce_add_epi32((__m512i)x); }

inline void store_bytes(int8_t* to, i32x16 v) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
}

#else

inline f32x16 all(float x) {
  f32x16 v;
  for (int i = 0; i < 16; ++i) v[i] = x;
  return v;
}

inline i32x16 all(int32_t x) {
  i32x16 v;
  for (int i = 0; i < 16; ++i) v[i] = x;
  return v;
}

inline f32x16 halves(const void* from) {
  uint16_t bits[16];
  memcpy(bits, from, sizeof bits);
  f32x16 v;
  for (int i = 0; i < 16; ++i) v[i] = to_float(bits[i]);
  return v;
}

inline void store_halves(uint16_t* to, f32x16 v) {
  for (int i = 0; i < 16; ++i) to[i] = to_half(v[i]);
}

inline i32x16 dot(i32x16 sum, u8x64 unsigned_bytes, i32x16 signed_bytes) {
  int8_t other[64];
  memcpy(other, &signed_bytes, sizeof other);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += int(unsigned_bytes[4 * i + j]) * other[4 * i + j];
  return sum;
}

inline i32x16 rounded(f32x16 x) {
  i32x16 v;
  for (int i = 0; i < 16; ++i) v[i] = int32_t(std::nearbyint(x[i]));
  return v;
}

inline f32x16 largest(f32x16 a, f32x16 b) { return a > b ? a : b; }

inline float peak(f32x16 x) {
  float m = x[0];
  for (int i = 1; i < 16; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

inline float total(f32x16 x) {
  float s = 0;
  for (int i = 0; i < 16; ++i) s += x[i];
  return s;
}

inline int32_t total(i32x16 x) {
  int32_t s = 0;
  for (int i = 0; i < 16; ++i) s += x[i];
  return s;
}

inline void store_bytes(int8_t* to, i32x16 v) {
  for (int i = 0; i < 16; ++i) to[i] = int8_t(v[i]);
}

#endif

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

}  // namespace treadle
