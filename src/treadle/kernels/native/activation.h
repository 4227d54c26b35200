// What is done to rows and lanes between products.
#pragma once

#include "lanes.h"

namespace treadle {

// y = x / sqrt(mean(x^2) + eps) * gain; y may be x. `width` is a multiple of 16.
inline void norm(const float* x, const float* gain, int width, float eps, float* y) {
  f32x16 sum = {};
  for (int d = 0; d < width; d += 16) {
    f32x16 part = load<f32x16>(x + d);
    sum += part * part;
  }
  float inverse = 1 / std::sqrt(total(sum) / float(width) + eps);
  for (int d = 0; d < width; d += 16)
    store(y + d, load<f32x16>(x + d) * inverse * load<f32x16>(gain + d));
}

enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

inline f32x16 activated(f32x16 x, int32_t activation) {
  switch (activation) {
    case kSilu: return x / (1.0f + exponential(-x));
    case kGelu:
      for (int i = 0; i < 16; ++i) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
      return x;
    case kGeluTanh:
      return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
    case kRelu: return largest(x, f32x16{});
    case kRelu2: return largest(x, f32x16{}) * largest(x, f32x16{});
  }
  return x;
}

}  // namespace treadle
