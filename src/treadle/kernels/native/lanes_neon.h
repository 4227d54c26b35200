// lanes.h on 64-bit ARM, with its dot product of bytes where TREADLE_DOTPROD says so. A vector is
// four registers.
#pragma once

#include <arm_neon.h>

namespace treadle {

constexpr int kHalves = 1, kRows = 3;
constexpr int kWideOffset = 0;

// f on each quarter of its arguments.
template <class Out, class F, class... In>
inline Out quarters(F f, const In&... in) {
  Out out;
  for (int i = 0; i < 4; ++i) {
    auto part = f(((const char*)&in + 16 * i)...);
    memcpy((char*)&out + 16 * i, &part, 16);
  }
  return out;
}

inline f32x16 all(float x) {
  return quarters<f32x16>([=] { return vdupq_n_f32(x); });
}

inline i32x16 all(int32_t x) {
  return quarters<i32x16>([=] { return vdupq_n_s32(x); });
}

inline void stream(float* to, f32x16 v) { store(to, v); }
inline void streamed() {}

inline f32x16 halves(const void* from) {
  f32x16 out;
  for (int i = 0; i < 4; ++i) {
    float32x4_t part = vcvt_f32_f16(vld1_f16((const float16_t*)from + 4 * i));
    memcpy((char*)&out + 16 * i, &part, 16);
  }
  return out;
}

inline void store_halves(uint16_t* to, f32x16 v) {
  for (int i = 0; i < 4; ++i)
    vst1_f16((float16_t*)to + 4 * i, vcvt_f16_f32(load<float32x4_t>((const char*)&v + 16 * i)));
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

#if defined(TREADLE_DOTPROD)

constexpr const char* kLevel = "neon-dotprod";

inline int32x4_t dot(int32x4_t sum, int8x16_t codes, int8x16_t a) {
  return vdotq_s32(sum, codes, a);
}

#else

constexpr const char* kLevel = "neon";

// One product of bytes is within 16 bits, the sum of two not.
inline int32x4_t dot(int32x4_t sum, int8x16_t codes, int8x16_t a) {
  int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(a)));
  int32x4_t high = vpaddlq_s16(vmull_high_s8(codes, a));
  return vaddq_s32(sum, vpaddq_s32(low, high));
}

#endif

inline i32x16 dot(i32x16 sum, u8x64 codes, i32x16 a) {
  return quarters<i32x16>(
      [](const char* s, const char* c, const char* b) {
        return dot(load<int32x4_t>(s), load<int8x16_t>(c), load<int8x16_t>(b));
      },
      sum, codes, a);
}

inline u8x64 wide(u8x64 codes) { return codes ^ 0x80; }
inline i32x16 dot_wide(i32x16 sum, u8x64 codes, i32x16 a) { return dot(sum, codes, a); }

inline i32x16 rounded(f32x16 x) {
  return quarters<i32x16>([](const char* v) { return vcvtnq_s32_f32(load<float32x4_t>(v)); }, x);
}

inline f32x16 largest(f32x16 a, f32x16 b) {
  return quarters<f32x16>(
      [](const char* x, const char* y) {
        return vmaxq_f32(load<float32x4_t>(x), load<float32x4_t>(y));
      },
      a, b);
}

inline float peak(f32x16 x) {
  const char* v = (const char*)&x;
  float32x4_t m = load<float32x4_t>(v);
  for (int i = 1; i < 4; ++i) m = vmaxq_f32(m, load<float32x4_t>(v + 16 * i));
  return vmaxvq_f32(m);
}

inline float total(f32x16 x) {
  const char* v = (const char*)&x;
  float32x4_t m = load<float32x4_t>(v);
  for (int i = 1; i < 4; ++i) m = vaddq_f32(m, load<float32x4_t>(v + 16 * i));
  return vaddvq_f32(m);
}

inline int32_t total(i32x16 x) {
  const char* v = (const char*)&x;
  int32x4_t m = load<int32x4_t>(v);
  for (int i = 1; i < 4; ++i) m = vaddq_s32(m, load<int32x4_t>(v + 16 * i));
  return vaddvq_s32(m);
}

inline void store_bytes(int8_t* to, i32x16 v) {
  for (int i = 0; i < 16; ++i) to[i] = int8_t(v[i]);
}

}  // namespace treadle
