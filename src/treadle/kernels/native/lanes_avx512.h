// lanes.h on AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

namespace treadle {

constexpr const char* kLevel = "avx512";
constexpr int kHalves = 2, kRows = 5;
constexpr int kWideOffset = 128;

inline f32x16 all(float x) { return (f32x16)_mm512_set1_ps(x); }
inline i32x16 all(int32_t x) { return (i32x16)_mm512_set1_epi32(x); }

inline void stream(float* to, f32x16 v) { _mm512_stream_ps(to, (__m512)v); }
inline void streamed() { _mm_sfence(); }

inline f32x16 halves(const void* from) {
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}

inline void store_halves(uint16_t* to, f32x16 v) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

inline i32x16 bytes(const void* from) {
  return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}

inline i32x16 signed_bytes(const void* from) {
  return (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
}

inline i32x16 dot(i32x16 sum, u8x64 codes, i32x16 a) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)a);
}

inline u8x64 wide(u8x64 codes) { return codes; }
inline i32x16 dot_wide(i32x16 sum, u8x64 codes, i32x16 a) { return dot(sum, codes, a); }

inline i32x16 rounded(f32x16 x) { return (i32x16)_mm512_cvtps_epi32((__m512)x); }
inline f32x16 largest(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
inline float peak(f32x16 x) { return _mm512_reduce_max_ps((__m512)x); }
inline float total(f32x16 x) { return _mm512_reduce_add_ps((__m512)x); }
inline int32_t total(i32x16 x) { return _mm512_reduce_add_epi32((__m512i)x); }

inline void store_bytes(int8_t* to, i32x16 v) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
}

}  // namespace treadle
