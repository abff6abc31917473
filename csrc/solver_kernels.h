// The arithmetic of the solver's ops on plain pointers. N rows, K columns, B columns of a block, G groups, C candidates.
//
// Plain loops over a fixed number of lanes: the compiler vectorizes them, and since no lane depends on the width of a
// register and nothing is fused or reassociated (-ffp-contract=off, no -ffast-math), every instruction set gives the same bits.
#pragma once

#include <algorithm>
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
#define DUOTONE_CLONES inline
#endif

namespace duotone {

constexpr int LANES = 64;      // rows of a tile of `sweep`: enough independent sums to hide the latency of an addition
constexpr int SUM_LANES = 16;  // partial sums of `scale_error`: part of its definition, not of the machine

enum Rule : int64_t { NEAREST_VALUE = 0, NEAREST_LEVEL = 1, INT4_ONLY = 2, FP8_VALUE = 3 };

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
    if (rule == FP8_VALUE) {
      t.level[q] = low;
      t.value[q] = fp8_round(clamp(w / outer, -fp8_max, fp8_max)) * outer;
      continue;
    }
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
    case FP8_VALUE: round_tile<FP8_VALUE>(t, low, high, s.fp8_max); break;
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

// A weight's rows and columns in the order they are visited, for the two ops that let rows answer for one another.
struct Rows {
  int64_t rows, columns;
  const float *group_scale, *zero_point;  // [G, N], [G, N] or null
  const int32_t* group;                   // [K]
  const float* outer_scale;               // [N] or [1]
  bool outer_per_row;
  float lowest, fp8_max;
  uint8_t* codes;  // `beam_rows`: [N, K]; `descend_rows`: [B, N]
  float* values;   // the same
};

struct Entry {
  float level, value;
};

// The 16 values of one row in one group.
struct Values {
  float scale, zero, outer, low, high, fp8_max;

  DUOTONE_INLINE Entry at(float level) const { return {level, fp8_product(level, zero, scale, fp8_max) * outer}; }
  DUOTONE_INLINE Entry nearest(float w) const {
    const Entry first = at(nearest_level(w, scale * outer, zero, low, high));
    const float side = (w > first.value ? 1.0f : 0.0f) - (w < first.value ? 1.0f : 0.0f);
    const Entry other = at(clamp(first.level + side, low, high));
    return std::fabs(w - other.value) < std::fabs(w - first.value) ? other : first;
  }
};

DUOTONE_INLINE Values values_of(const Rows& s, int64_t row, int64_t column) {
  const int64_t at = s.group[column] * s.rows + row;
  const float outer = s.outer_scale[s.outer_per_row ? row : 0];
  return {s.group_scale[at], s.zero_point ? s.zero_point[at] : 0.0f, outer, s.lowest, s.lowest + 15.0f, s.fp8_max};
}

struct Beam : Rows {
  int64_t width;
  bool revisit;
  const float* target;    // [N, K]
  const float* coupling;  // [N, N]: row m holds what its error weighs in the wish of every other row
  int64_t padded;         // columns of `unit`: K and zeros to whole spans
  const float* unit;      // [padded / SPAN, K, SPAN]: by span, what the error of row k weighs in every later column
  const float* diagonal;  // [K]
};

constexpr int SPAN = 32;  // columns that paths are carried through before what they left is written to their histories

// What is kept of the paths of one row while its columns are decided. Inside a span only a few numbers follow a path from slot
// to slot; its history stays where the path was when the span began.
struct Path {
  float cost;
  int32_t origin;        // the slot of its history
  float wish[SPAN];      // of the span's columns, all columns decided taken into account
  float left[SPAN];      // wish less value, of the span's columns decided
  uint8_t codes[SPAN];
};

struct Paths {
  explicit Paths(const Beam& s)
      : path(s.width), left(s.width * s.columns), codes(s.width * s.columns), next_left(s.width * s.columns),
        next_codes(s.width * s.columns), wish(s.width), cost(2 * s.width), sorted(2 * s.width), level(2 * s.width),
        value(2 * s.width), taken(s.width), moved(s.width) {}
  std::vector<Path> path;
  std::vector<float> left, next_left;      // [width, K]: histories, and those being written
  std::vector<uint8_t> codes, next_codes;  // [width, K]
  std::vector<float> wish;                 // [paths]: of the column that is being decided
  // Children of all paths, [2 * paths]: first those that take the nearest value, then those that take the one next to it.
  std::vector<float> cost, sorted, level, value;
  std::vector<int32_t> taken;  // by slot: the child that it will hold, or -1
  std::vector<int32_t> moved;  // children that find their parent's slot taken
};

// Wishes of the span's columns j0..j0+SPAN-1 for every path, two paths at a time: what they share is read once.
DUOTONE_INLINE void begin_span(const Beam& s, Paths& p, const float* wish, int64_t j0, int count, int32_t paths) {
  const float* unit = s.unit + j0 * s.columns;
  for (int32_t b = 0; b < paths; b += 2) {
    const int32_t second = b + 1 < paths ? b + 1 : b;
    const float *left0 = &p.left[b * s.columns], *left1 = &p.left[second * s.columns];
    float sum0[SPAN], sum1[SPAN];  // local, so that they stay in registers
    for (int q = 0; q < SPAN; q++) sum0[q] = sum1[q] = q < count ? wish[j0 + q] : 0.0f;
    for (int64_t k = 0; k < j0; k++) {
      const float *weights = unit + k * SPAN, l0 = left0[k], l1 = left1[k];
      for (int q = 0; q < SPAN; q++) sum0[q] += l0 * weights[q];
      for (int q = 0; q < SPAN; q++) sum1[q] += l1 * weights[q];
    }
    std::memcpy(p.path[b].wish, sum0, sizeof(sum0));
    std::memcpy(p.path[second].wish, sum1, sizeof(sum1));
    p.path[b].origin = b, p.path[second].origin = second;
  }
}

// The span's columns become part of every path's history.
DUOTONE_INLINE void end_span(const Beam& s, Paths& p, int64_t j0, int count, int32_t paths) {
  for (int32_t b = 0; b < paths; b++) {
    const Path& path = p.path[b];
    const int64_t to = b * s.columns, from = path.origin * s.columns;
    std::memcpy(&p.next_left[to], &p.left[from], sizeof(float) * j0);
    std::memcpy(&p.next_codes[to], &p.codes[from], j0);
    std::memcpy(&p.next_left[to + j0], path.left, sizeof(float) * count);
    std::memcpy(&p.next_codes[to + j0], path.codes, count);
  }
  std::swap(p.left, p.next_left);
  std::swap(p.codes, p.next_codes);
}

// Both children of every path: plain loops over paths, for the compiler to vectorize.
DUOTONE_INLINE void bear(const Values& values, Paths& p, float curvature, int32_t paths) {
  const float step = values.scale * values.outer;
  const float* wish = p.wish.data();
  float *level = p.level.data(), *value = p.value.data(), *cost = p.cost.data();
  for (int32_t b = 0; b < paths; b++) {
    const float w = wish[b], own = cost[b];
    const float first = nearest_level(w, step, values.zero, values.low, values.high);
    const float first_value = values.at(first).value;
    const float side = (w > first_value ? 1.0f : 0.0f) - (w < first_value ? 1.0f : 0.0f);
    const float other = clamp(first + side, values.low, values.high), other_value = values.at(other).value;
    const bool nearer = std::fabs(w - other_value) < std::fabs(w - first_value);
    const float near = nearer ? other : first, near_value = nearer ? other_value : first_value;
    // The neighbor on the far side of w; at an edge, the one before it.
    const float beyond = near + (w > near_value ? 1.0f : -1.0f);
    const float far = (beyond < values.low) | (beyond > values.high) ? 2.0f * near - beyond : beyond;
    const float far_value = values.at(far).value;
    level[b] = near, value[b] = near_value, level[paths + b] = far, value[paths + b] = far_value;
    cost[b] = own + (w - near_value) * (w - near_value) * curvature;
    cost[paths + b] = own + (w - far_value) * (w - far_value) * curvature;
  }
}

// The `count` cheapest children take their places: the first child of a path stays in its slot, others go to slots left free.
// Of equal costs the lower index survives, so the outcome does not depend on how the threshold is found.
DUOTONE_INLINE void survive(const Beam& s, Paths& p, const float* unit, int c, float wish, int32_t paths, int32_t count) {
  const int32_t children = 2 * paths;
  // A cost that is no number has no order: it is the highest, so that `count` children survive whatever the weights hold.
  for (int32_t i = 0; i < children; i++) p.cost[i] = p.cost[i] < INFINITY ? p.cost[i] : INFINITY;
  float threshold = INFINITY;
  int32_t at_threshold = children;
  if (count < children) {
    std::copy(p.cost.begin(), p.cost.begin() + children, p.sorted.begin());
    std::nth_element(p.sorted.begin(), p.sorted.begin() + count - 1, p.sorted.begin() + children);
    threshold = p.sorted[count - 1];
    at_threshold = count;
    for (int32_t i = 0; i < children; i++) at_threshold -= p.cost[i] < threshold;
  }
  std::fill(p.taken.begin(), p.taken.begin() + count, -1);
  int32_t moved = 0;
  for (int32_t i = 0; i < children; i++) {
    if (!(p.cost[i] < threshold) && !(p.cost[i] == threshold && at_threshold-- > 0)) continue;
    const int32_t parent = i < paths ? i : i - paths;
    if (p.taken[parent] < 0) p.taken[parent] = i;
    else p.moved[moved++] = i;
  }
  int32_t slot = 0;
  for (int32_t i = 0; i < moved; i++) {
    const int32_t child = p.moved[i];
    while (p.taken[slot] >= 0) slot++;
    p.path[slot] = p.path[child < paths ? child : child - paths];
    p.taken[slot] = child;
  }
  for (int32_t i = 0; i < count; i++) {  // survivors fill the slots from the first on: paths never get fewer
    const int32_t child = p.taken[i];
    Path& path = p.path[i];
    const float left = wish - p.value[child];
    path.cost = p.cost[child];
    path.left[c] = left;
    path.codes[c] = static_cast<uint8_t>(static_cast<int32_t>(p.level[child] - s.lowest));
    for (int q = 0; q < SPAN; q++) path.wish[q] += left * unit[q];  // those of columns already decided no longer matter
  }
}

// Decides one column of a span for all paths; how many paths there are then.
DUOTONE_INLINE int32_t decide(const Beam& s, Paths& p, float wish, int64_t row, int64_t j0, int c, int32_t paths) {
  for (int32_t b = 0; b < paths; b++) p.wish[b] = p.path[b].wish[c], p.cost[b] = p.path[b].cost;
  bear(values_of(s, row, j0 + c), p, s.diagonal[j0 + c] * s.diagonal[j0 + c], paths);
  const int32_t count = static_cast<int32_t>(std::min<int64_t>(2 * paths, s.width));
  survive(s, p, s.unit + j0 * s.columns + (j0 + c) * SPAN, c, wish, paths, count);
  return count;
}

// Decides one row's columns in order, keeping the `width` cheapest paths; the index of the cheapest one at the end.
DUOTONE_INLINE int32_t beam_row(const Beam& s, Paths& p, const float* wish, int64_t row) {
  int32_t paths = 1;
  p.path[0].cost = 0.0f;
  for (int64_t j0 = 0; j0 < s.columns; j0 += SPAN) {
    const int count = static_cast<int>(std::min<int64_t>(SPAN, s.columns - j0));
    begin_span(s, p, wish, j0, count, paths);
    for (int c = 0; c < count; c++) paths = decide(s, p, wish[j0 + c], row, j0, c, paths);
    end_span(s, p, j0, count, paths);
  }
  int32_t best = 0;
  for (int32_t b = 1; b < paths; b++)
    if (p.path[b].cost < p.path[best].cost) best = b;
  return best;
}

// What values cost a row with this wish. sum: [padded], for what earlier columns leave to later ones.
DUOTONE_INLINE float row_cost(const Beam& s, const float* wish, const float* values, float* sum) {
  float cost = 0.0f;
  std::memcpy(sum, wish, sizeof(float) * s.columns);
  for (int64_t j = 0; j < s.columns; j++) {
    const float error = sum[j] - values[j], left = wish[j] - values[j];
    cost += error * error * (s.diagonal[j] * s.diagonal[j]);
    for (int64_t j0 = j / SPAN * SPAN; j0 < s.padded; j0 += SPAN)
      for (int q = 0; q < SPAN; q++) sum[j0 + q] += left * s.unit[j0 * s.columns + j * SPAN + q];
  }
  return cost;
}

DUOTONE_CLONES void beam_rows(const Beam& s) {
  Paths paths(s);
  std::vector<float> error(s.rows * s.columns, 0.0f), wish(s.columns), sum(s.padded);
  if (s.revisit)
    for (int64_t i = 0; i < s.rows * s.columns; i++) error[i] = s.target[i] - s.values[i];
  for (int64_t n = 0; n < s.rows; n++) {
    const float* target = s.target + n * s.columns;
    std::memcpy(wish.data(), target, sizeof(float) * s.columns);
    for (int64_t m = 0; m < (s.revisit ? s.rows : n); m++) {
      if (m == n) continue;
      const float weight = s.coupling[m * s.rows + n];
      const float* other = error.data() + m * s.columns;
      for (int64_t k = 0; k < s.columns; k++) wish[k] += weight * other[k];
    }
    const int32_t best = beam_row(s, paths, wish.data(), n);
    float* values = s.values + n * s.columns;
    if (s.revisit && row_cost(s, wish.data(), values, sum.data()) <= paths.path[best].cost) continue;
    for (int64_t k = 0; k < s.columns; k++) {
      const uint8_t code = paths.codes[best * s.columns + k];
      s.codes[n * s.columns + k] = code;
      values[k] = values_of(s, n, k).at(static_cast<float>(code) + s.lowest).value;
      error[n * s.columns + k] = target[k] - values[k];
    }
  }
}

struct Descent : Rows {
  const float* pull;       // [B, N]: O E H of the block's columns
  const float* curvature;  // [N, N]: O
  const float* hessian;    // [B, B]
  float* change;           // [B, N]: O times what the values moved by
};

DUOTONE_CLONES void descend_rows(const Descent& s) {
  const int64_t rows = s.rows;
  std::vector<float> pull(rows);
  for (int64_t j = 0; j < s.columns; j++) {
    float *moved = s.change + j * rows, *value = s.values + j * rows;
    const float own = s.hessian[j * s.columns + j];
    std::fill(moved, moved + rows, 0.0f);
    std::memcpy(pull.data(), s.pull + j * rows, sizeof(float) * rows);
    for (int64_t i = 0; i < j; i++) {
      const float weight = s.hessian[i * s.columns + j];
      const float* earlier = s.change + i * rows;
      for (int64_t n = 0; n < rows; n++) pull[n] -= weight * earlier[n];
    }
    for (int64_t n = 0; n < rows; n++) {
      const float* weights = s.curvature + n * rows;
      const Entry to = values_of(s, n, j).nearest(value[n] + (pull[n] / own - moved[n]) / weights[n]);
      const float step = to.value - value[n];
      if (step == 0.0f) continue;
      value[n] = to.value;
      s.codes[j * rows + n] = static_cast<uint8_t>(static_cast<int32_t>(to.level - s.lowest));
      for (int64_t m = 0; m < rows; m++) moved[m] += weights[m] * step;
    }
  }
}

}  // namespace duotone
