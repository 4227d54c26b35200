// lanes.h in plain C++.
#pragma once

namespace treadle {

constexpr const char* kLevel = "portable";
constexpr int kHalves = 1, kRows = 2;
constexpr int kWideOffset = 128;

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

inline void stream(float* to, f32x16 v) { store(to, v); }
inline void streamed() {}

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

inline i32x16 bytes(const void* from) {
  i32x16 v;
  for (int i = 0; i < 16; ++i) v[i] = ((const uint8_t*)from)[i];
  return v;
}

inline i32x16 signed_bytes(const void* from) {
  i32x16 v;
  for (int i = 0; i < 16; ++i) v[i] = ((const int8_t*)from)[i];
  return v;
}

inline i32x16 dot(i32x16 sum, u8x64 codes, i32x16 a) {
  int8_t other[64];
  memcpy(other, &a, sizeof other);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += int(codes[4 * i + j]) * other[4 * i + j];
  return sum;
}

inline u8x64 wide(u8x64 codes) { return codes; }
inline i32x16 dot_wide(i32x16 sum, u8x64 codes, i32x16 a) { return dot(sum, codes, a); }

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

}  // namespace treadle
