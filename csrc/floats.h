// BF16 and FP8 as bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "solver_kernels.h"

namespace duotone {

DUOTONE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

DUOTONE_INLINE float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
DUOTONE_INLINE float widen(float x) { return x; }

// Half to even; a NaN stays one.
DUOTONE_INLINE void narrow(float x, uint16_t& to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  to = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
DUOTONE_INLINE void narrow(float x, float& to) { to = x; }

// A float rounded to BF16 and back.
DUOTONE_INLINE float rounded(float x) {
  uint16_t bf16;
  narrow(x, bf16);
  return widen(bf16);
}

// E4M3FN: four bits of exponent, bias 7, three of mantissa; all ones is NaN, and there is no infinity.
struct Fp8 {
  uint8_t bits;
};

// x * scale rounded to BF16, for a positive scale. Subnormals are the next binade less its lower end; all in whole numbers that
// compilers vectorize.
DUOTONE_INLINE float scaled(Fp8 x, float scale) {
  const uint32_t magnitude = x.bits & 0x7Fu, subnormal = magnitude < 8 ? 1u : 0u;
  const uint32_t raised = (magnitude << 20) + ((120u + subnormal) << 23);
  float value;
  std::memcpy(&value, &raised, 4);
  uint32_t bits = bits_of((value - (subnormal ? 0x1p-6f : 0.0f)) * scale);
  bits = (bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u;
  bits = (magnitude == 0x7Fu ? 0x7FC00000u : bits) | (static_cast<uint32_t>(x.bits) & 0x80u) << 24;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Half to even, saturating at +-`most`, as torch casts what is clamped; a NaN stays one.
DUOTONE_INLINE void narrow(float x, float most, Fp8& to) {
  const uint32_t sign = bits_of(x) >> 24 & 0x80u, magnitude = bits_of(fp8_round(clamp(x, -most, most))) & 0x7FFFFFFFu;
  float value;
  std::memcpy(&value, &magnitude, 4);
  uint32_t bits = value < 0x1p-6f ? static_cast<uint32_t>(static_cast<int32_t>(value * 0x1p9f)) : (magnitude >> 20) - (120u << 3);
  bits = magnitude > 0x7F800000u ? 0x7Fu : bits;
  to.bits = static_cast<uint8_t>(bits | sign);
}

// e^x within 2^-22 of itself, without a branch so that loops over it are vectorized; beyond +-87 it stays at those ends.
// Coefficients: Cephes' expf.
DUOTONE_INLINE float exponential(float x) {
  x = clamp(x, -87.0f, 87.0f);
  const float power = round_half_even(x * 1.44269504f);
  const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(power) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return (p * r * r + r + 1.0f) * scale;
}

}  // namespace duotone
