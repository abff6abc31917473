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

}  // namespace duotone
