// The arithmetic of the two solver ops on plain pointers. N rows, K columns, B columns of a block, G groups, C candidates.
//
// Plain loops over a fixed number of lanes: the compiler vectorizes them, and since no lane depends on the width of a
// register and nothing is fused or reassociated (-ffp-contract=off, no -ffast-math), every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__GNUC__)
#define DUOTONE_INLINE inline __attribute__((always_inline))
#else
#define DUOTONE_INLINE inline
#endif

// One binary for any x86-64: the loader takes the widest clone that the CPU has. This needs ifunc, that is glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(DUOTONE_NO_CLONES)
#define DUOTONE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DUOTONE_CLONES
#endif

namespace duotone {

constexpr int LANES = 64;      // rows of a tile of `sweep`: enough independent sums to hide the latency of an addition
constexpr int SUM_LANES = 16;  // partial sums of `scale_error`: part of its definition, not of the machine

enum Rule : int64_t { NEAREST_VALUE = 0, NEAREST_LEVEL = 1, INT4_ONLY = 2 };

// Ordered so that each is one min or max instruction, NaN passing through.
DUOTONE_INLINE float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Half to even for |x| < 2^22 by adding and taking away 1.5 * 2^23; beyond, it is off by less than one and clamped anyway.
DUOTONE_INLINE float round_half_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// E4M3 of |x| <= 448: adding 1.5 * 2^20 times x's power of two leaves three mantissa bits, rounded half to even; subnormals
// are what the smallest normal exponent, -6, does to smaller numbers. Only the sign of a zero is lost.
DUOTONE_INLINE float fp8_round(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0x7F800000u;
  constexpr uint32_t smallest = (127u - 6u) << 23;
  bits = bits < smallest ? smallest : bits;
  float power;
  std::memcpy(&power, &bits, 4);
  const float shift = power * 1572864.0f;
  return (x + shift) - shift;
}

DUOTONE_INLINE float nearest_level(float w, float step, float zero, float low, float high) {
  return clamp(round_half_even(w / step) + zero, low, high);
}

DUOTONE_INLINE float fp8_product(float level, float zero, float scale, float fp8_max) {
  return fp8_round(clamp((level - zero) * scale, -fp8_max, fp8_max));
}

struct Sweep {
  int64_t rows, columns, rule;
  const float *base, *reference;  // [B, N]
  const float* coupling;          // [B, B] transposed: row j holds what every earlier column i < j weighs in column j
  const float *group_scale, *zero_point;  // [G, N], [G, N] or null
  const int32_t* group;                   // [B]
  const float* outer_scale;               // [N] or [1]
  bool outer_per_row;
  float lowest, fp8_max;
  uint8_t* codes;  // [B, N]
  float* values;   // [B, N]
};

// One tile of a column, structure of arrays.
struct Tile {
  float wish[LANES], scale[LANES], zero[LANES], outer[LANES], level[LANES], value[LANES];
};

template <int rule>
DUOTONE_INLINE void round_tile(Tile& t, float low, float high, float fp8_max) {
  for (int q = 0; q < LANES; q++) {
    const float w = t.wish[q], zero = t.zero[q], scale = t.scale[q], outer = t.outer[q], step = scale * outer;
    const float level = nearest_level(w, step, zero, low, high);
    if (rule == INT4_ONLY) {
      t.level[q] = level;
      t.value[q] = (level - zero) * step;
      continue;
    }
    const float value = fp8_product(level, zero, scale, fp8_max) * outer;
    if (rule == NEAREST_LEVEL) {
      t.level[q] = level;
      t.value[q] = value;
      continue;
    }
    // Values rise with the level, so only the neighbor on the weight's side can be nearer.
    const float side = (w > value ? 1.0f : 0.0f) - (w < value ? 1.0f : 0.0f);
    const float other = clamp(level + side, low, high);
    const float other_value = fp8_product(other, zero, scale, fp8_max) * outer;
    const bool nearer = std::fabs(w - other_value) < std::fabs(w - value);
    t.level[q] = nearer ? other : level;
    t.value[q] = nearer ? other_value : value;
  }
}

// `count` of LANES rows of one column, starting at row n0; `change` [B][LANES] holds what earlier columns left.
DUOTONE_INLINE void sweep_column(const Sweep& s, Tile& t, float* change, int64_t j, int64_t n0, int count) {
  const int64_t at = j * s.rows + n0, group_at = s.group[j] * s.rows + n0;
  float wish[LANES];  // local, so that the sum stays in registers
  if (count == LANES) {
    for (int q = 0; q < LANES; q++) wish[q] = s.base[at + q];
    for (int q = 0; q < LANES; q++) t.scale[q] = s.group_scale[group_at + q];
    if (s.zero_point) for (int q = 0; q < LANES; q++) t.zero[q] = s.zero_point[group_at + q];
  } else {
    for (int q = 0; q < LANES; q++) wish[q] = q < count ? s.base[at + q] : 0.0f;
    for (int q = 0; q < LANES; q++) t.scale[q] = q < count ? s.group_scale[group_at + q] : 1.0f;
    if (s.zero_point) for (int q = 0; q < LANES; q++) t.zero[q] = q < count ? s.zero_point[group_at + q] : 0.0f;
  }
  const float* weights = s.coupling + j * s.columns;
  for (int64_t i = 0; i < j; i++) {
    const float weight = weights[i];
    const float* earlier = change + i * LANES;
    for (int q = 0; q < LANES; q++) wish[q] += weight * earlier[q];
  }
  for (int q = 0; q < LANES; q++) t.wish[q] = wish[q];
  const float low = s.lowest, high = s.lowest + 15.0f;
  switch (s.rule) {
    case NEAREST_VALUE: round_tile<NEAREST_VALUE>(t, low, high, s.fp8_max); break;
    case NEAREST_LEVEL: round_tile<NEAREST_LEVEL>(t, low, high, s.fp8_max); break;
    default: round_tile<INT4_ONLY>(t, low, high, s.fp8_max); break;
  }
  float* left = change + j * LANES;
  if (count == LANES) {
    for (int q = 0; q < LANES; q++) left[q] = s.reference[at + q] - t.value[q];
    for (int q = 0; q < LANES; q++) s.values[at + q] = t.value[q];
    for (int q = 0; q < LANES; q++) s.codes[at + q] = static_cast<uint8_t>(static_cast<int32_t>(t.level[q] - low));
  } else {
    for (int q = 0; q < LANES; q++) left[q] = 0.0f;
    for (int q = 0; q < count; q++) {
      left[q] = s.reference[at + q] - t.value[q];
      s.values[at + q] = t.value[q];
      s.codes[at + q] = static_cast<uint8_t>(static_cast<int32_t>(t.level[q] - low));
    }
  }
}

// Tiles first..last-1 of LANES rows, all columns of the block one after the other.
DUOTONE_CLONES void sweep_tiles(const Sweep& s, int64_t first, int64_t last) {
  std::vector<float> change(static_cast<size_t>(s.columns) * LANES);
  Tile t;
  for (int64_t tile = first; tile < last; tile++) {
    const int64_t n0 = tile * LANES;
    const int count = static_cast<int>(s.rows - n0 < LANES ? s.rows - n0 : LANES);
    for (int q = 0; q < LANES; q++) {
      t.zero[q] = 0.0f;
      t.outer[q] = !s.outer_per_row ? s.outer_scale[0] : q < count ? s.outer_scale[n0 + q] : 1.0f;
    }
    for (int64_t j = 0; j < s.columns; j++) sweep_column(s, t, change.data(), j, n0, count);
  }
}

struct ScaleError {
  int64_t rows, columns, groups, candidates, group_size;
  const float *weight, *candidate;  // [N, K], [N, G, C]
  const float* zero_point;          // [N, G] or null
  const float* outer_scale;         // [N] or [1]
  bool outer_per_row;
  const float* column_weight;  // [K] or null
  float lowest, fp8_max;
  float* error;  // [N, G, C]
};

// Rows first..last-1. A group is padded to whole lanes with columns that weigh nothing.
DUOTONE_CLONES void scale_error_rows(const ScaleError& s, int64_t first, int64_t last) {
  const int64_t padded = (s.group_size + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
  std::vector<float> scaled(padded), share(padded);
  const float low = s.lowest, high = s.lowest + 15.0f, fp8_max = s.fp8_max;
  // Groups outermost: their column weights are laid out once for all rows.
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t k0 = g * s.group_size;
    const int64_t width = s.columns - k0 < s.group_size ? s.columns - k0 : s.group_size;
    for (int64_t k = 0; k < padded; k++) share[k] = k >= width ? 0.0f : s.column_weight ? s.column_weight[k0 + k] : 1.0f;
    for (int64_t n = first; n < last; n++) {
      const float outer = s.outer_scale[s.outer_per_row ? n : 0], zero = s.zero_point ? s.zero_point[n * s.groups + g] : 0.0f;
      for (int64_t k = 0; k < width; k++) scaled[k] = s.weight[n * s.columns + k0 + k] / outer;
      for (int64_t k = width; k < padded; k++) scaled[k] = 0.0f;
      for (int64_t c = 0; c < s.candidates; c++) {
        const int64_t at = (n * s.groups + g) * s.candidates + c;
        const float scale = s.candidate[at];
        float sum[SUM_LANES] = {};
        for (int64_t k = 0; k < padded; k += SUM_LANES) {
          const float *x = scaled.data() + k, *weight = share.data() + k;
          for (int q = 0; q < SUM_LANES; q++) {
            const float residual = fp8_product(nearest_level(x[q], scale, zero, low, high), zero, scale, fp8_max) - x[q];
            sum[q] += residual * residual * weight[q];
          }
        }
        for (int half = SUM_LANES / 2; half; half /= 2)
          for (int q = 0; q < half; q++) sum[q] += sum[q + half];
        s.error[at] = sum[0] * (outer * outer);
      }
    }
  }
}

}  // namespace duotone
