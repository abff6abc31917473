// BF16 as bits.
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
