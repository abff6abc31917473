// Activations for the W4A8 linear, as 16-bit numbers.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "floats.h"
#include "linear_kernels.h"

namespace duotone {
namespace {

// A segment's whole numbers of 2^-9: as many bits as fit 16, and apart from them what is below.
DUOTONE_INLINE Segment split_segment(const int32_t* value, int64_t chunks, int16_t* high, int16_t* low) {
  int32_t largest = 0;
  for (int64_t k = 0; k < chunks * CHUNK; k++) largest = std::max(largest, std::abs(value[k]));
  const int shift = shift_of(largest);
  Segment found{LOW_SCALE * static_cast<float>(1 << shift), 0, 0, 0};
  for (int64_t c = 0; c < chunks; c++) {
    int32_t any = 0;
    for (int64_t k = c * CHUNK; k < (c + 1) * CHUNK; k++) {
      const int32_t above = value[k] >> shift, below = value[k] - (above << shift);
      high[k] = static_cast<int16_t>(above), low[k] = static_cast<int16_t>(below);
      found.high_sum += above, found.low_sum += below;
      any |= below;
    }
    found.low_parts |= any ? uint32_t{1} << c : 0;
  }
  return found;
}

// A token on the FP8 grid, in whole numbers of LOW_SCALE; returns its scale.
template <typename T>
DUOTONE_INLINE float whole_numbers(const Linear& p, const T* x, int32_t* value) {
  uint32_t largest = 0;  // without their sign, floats rise with their bits, NaN above all
  for (int64_t k = 0; k < p.in_features; k++) largest = std::max(largest, bits_of(widen(x[k])) & 0x7FFFFFFFu);
  const Activations of = activations(p, largest);
  for (int64_t k = 0; k < p.in_features; k++) {
    const float fp8 = of.number ? fp8_round(clamp(widen(x[k]) / of.scale, -p.fp8_max, p.fp8_max)) : 0.0f;
    value[k] = static_cast<int32_t>(fp8 / LOW_SCALE);
  }
  for (int64_t k = p.in_features; k < p.columns(); k++) value[k] = 0;
  return of.scale;
}

template <typename T>
DUOTONE_INLINE float split_token(const Linear& p, const T* x, int64_t token, int32_t* value) {
  const float scale = whole_numbers(p, x, value);
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t at = p.at(s, token);
    Segment of = split_segment(value + s * p.segment_chunks * CHUNK, p.chunks_of(s), p.high + at, p.low + at);
    if (p.bias >= 0) of.high_sum *= p.bias, of.low_sum *= p.bias;
    p.put(s, token, of);
  }
  return scale;
}

DUOTONE_CLONES float split(const Linear& p, const uint16_t* x, int64_t token, int32_t* value) {
  return split_token(p, x, token, value);
}
DUOTONE_CLONES float split(const Linear& p, const float* x, int64_t token, int32_t* value) {
  return split_token(p, x, token, value);
}

}  // namespace

float split_words(const Linear& p, const uint16_t* x, int64_t token) {
  std::vector<int32_t> value(static_cast<size_t>(p.columns()));
  return split(p, x, token, value.data());
}
float split_words(const Linear& p, const float* x, int64_t token) {
  std::vector<int32_t> value(static_cast<size_t>(p.columns()));
  return split(p, x, token, value.data());
}

}  // namespace duotone
