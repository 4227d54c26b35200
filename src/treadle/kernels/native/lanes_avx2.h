// lanes.h on AVX2, and on AVX-VNNI where TREADLE_AVXVNNI says so. A vector is two registers.
#pragma once

#include <immintrin.h>

#include <algorithm>

namespace treadle {

constexpr int kHalves = 1, kRows = 2;

struct Pair {
  __m256i low, high;
};

inline Pair halved(const void* v) {
  return {_mm256_loadu_si256((const __m256i*)v), _mm256_loadu_si256((const __m256i*)v + 1)};
}

template <class V>
inline V joined(__m256i low, __m256i high) {
  __m256i both[2] = {low, high};
  return load<V>(both);
}

template <class V>
inline V joined(__m256 low, __m256 high) {
  return joined<V>(_mm256_castps_si256(low), _mm256_castps_si256(high));
}

inline f32x16 all(float x) { return joined<f32x16>(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline i32x16 all(int32_t x) { return joined<i32x16>(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }

inline void stream(float* to, f32x16 v) {
  Pair x = halved(&v);
  _mm256_stream_si256((__m256i*)to, x.low);
  _mm256_stream_si256((__m256i*)to + 1, x.high);
}
inline void streamed() { _mm_sfence(); }

inline f32x16 halves(const void* from) {
  const __m128i* at = (const __m128i*)from;
  return joined<f32x16>(_mm256_cvtph_ps(_mm_loadu_si128(at)),
                        _mm256_cvtph_ps(_mm_loadu_si128(at + 1)));
}

inline void store_halves(uint16_t* to, f32x16 v) {
  Pair x = halved(&v);
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(_mm256_castsi256_ps(x.low), nearest));
  _mm_storeu_si128((__m128i*)to + 1, _mm256_cvtps_ph(_mm256_castsi256_ps(x.high), nearest));
}

inline i32x16 bytes(const void* from) {
  const uint8_t* at = (const uint8_t*)from;
  return joined<i32x16>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at)),
                        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8))));
}

inline i32x16 signed_bytes(const void* from) {
  const uint8_t* at = (const uint8_t*)from;
  return joined<i32x16>(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)),
                        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(at + 8))));
}

#if defined(TREADLE_AVXVNNI)

constexpr const char* kLevel = "avx-vnni";
constexpr int kWideOffset = 128;

inline __m256i dot(__m256i sum, __m256i codes, __m256i a) {
  return _mm256_dpbusd_avx_epi32(sum, codes, a);
}

inline u8x64 wide(u8x64 codes) { return codes; }
inline __m256i dot_wide(__m256i sum, __m256i codes, __m256i a) { return dot(sum, codes, a); }

#else

constexpr const char* kLevel = "avx2";
constexpr int kWideOffset = 0;

// The pairs of products are summed in 16 bits: 2 * 127 * 128 is within them, 2 * 127 * 255 not.
inline __m256i dot(__m256i sum, __m256i codes, __m256i a) {
  __m256i pairs = _mm256_maddubs_epi16(codes, a);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline u8x64 wide(u8x64 codes) { return codes ^ 0x80; }

inline __m256i dot_wide(__m256i sum, __m256i codes, __m256i a) {
  return dot(sum, _mm256_abs_epi8(codes), _mm256_sign_epi8(a, codes));
}

#endif

inline i32x16 dot(i32x16 sum, u8x64 codes, i32x16 a) {
  Pair s = halved(&sum), c = halved(&codes), b = halved(&a);
  return joined<i32x16>(dot(s.low, c.low, b.low), dot(s.high, c.high, b.high));
}

inline i32x16 dot_wide(i32x16 sum, u8x64 codes, i32x16 a) {
  Pair s = halved(&sum), c = halved(&codes), b = halved(&a);
  return joined<i32x16>(dot_wide(s.low, c.low, b.low), dot_wide(s.high, c.high, b.high));
}

inline i32x16 rounded(f32x16 x) {
  Pair v = halved(&x);
  return joined<i32x16>(_mm256_cvtps_epi32(_mm256_castsi256_ps(v.low)),
                        _mm256_cvtps_epi32(_mm256_castsi256_ps(v.high)));
}

inline f32x16 largest(f32x16 a, f32x16 b) {
  Pair x = halved(&a), y = halved(&b);
  return joined<f32x16>(
      _mm256_max_ps(_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(y.low)),
      _mm256_max_ps(_mm256_castsi256_ps(x.high), _mm256_castsi256_ps(y.high)));
}

inline float peak(f32x16 x) {
  Pair v = halved(&x);
  __m256 m = _mm256_max_ps(_mm256_castsi256_ps(v.low), _mm256_castsi256_ps(v.high));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline float total(f32x16 x) {
  Pair v = halved(&x);
  __m256 m = _mm256_add_ps(_mm256_castsi256_ps(v.low), _mm256_castsi256_ps(v.high));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

inline int32_t total(i32x16 x) {
  Pair v = halved(&x);
  __m256i m = _mm256_add_epi32(v.low, v.high);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}

inline void store_bytes(int8_t* to, i32x16 v) {
  for (int i = 0; i < 16; ++i) to[i] = int8_t(v[i]);
}

}  // namespace treadle
