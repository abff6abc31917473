// The W4A8 linear for AVX-512 with VNNI and VBMI, in bytes: a lookup gives 64 weights, 4 columns of 16 rows, and an instruction
// multiplies them with 4 columns of a token. Those are whole numbers of 16 bits, so in two digits of base 256, both with a sign.
//
// Where scales are FP8 values, the 16 values of a group depend on the three bits of its scale's mantissa, but for a power of two:
// eight rows of 16 are the whole table, two registers hold it, and each byte is looked up in its own row. A subnormal scale has
// the mantissa of a normal one.
//
// Layout: codes [N/16][K/8][16 rows][4 bytes], byte b of a row has column b in its low half and column 4 + b in its high half;
// index [N/16][G][16 rows], a mantissa in bits 4 to 6 and an exponent in bits 0 to 3. Activations: in place of
// a segment's columns [K/8][2 halves][2 digits, high and low][4 columns], and as bytes what the segment's shift cut off.
#include "linear_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma")
#endif
#include <immintrin.h>

#define DUOTONE_ALWAYS inline __attribute__((always_inline))

namespace duotone {
namespace {

constexpr int64_t ROWS = COLUMN_ROWS, STEP = COLUMN_STEP, STEP_BYTES = 64;
constexpr int64_t CHUNK_STEPS = CHUNK / STEP;
constexpr int MOST = 8;                                  // tokens of a tile
constexpr int64_t FEW = 16;                              // tokens for which weights are decoded for each tile, and never stored
constexpr int64_t CACHED = 2048;                         // columns of TOKEN_BLOCK tokens that stay in the second level of cache
constexpr int64_t PART = 512;                            // columns of a panel: decoded weights of a block that many tokens meet
constexpr int64_t AHEAD = 8192, FAR_AHEAD = 24576;       // bytes of codes to fetch ahead, into the first and second level of cache

struct Table {
  __m512i first, second;

  DUOTONE_ALWAYS explicit Table(const Linear& p)
      : first(_mm512_loadu_si512(p.by_mantissa)), second(_mm512_loadu_si512(p.by_mantissa + 64)) {}
};

// Sixteen rows of a group: which row of the table each byte of a step is in, and the units' exponents, where a float has them:
// to multiply powers of two is to add their bits.
struct Group {
  __m512i select, unit;

  DUOTONE_ALWAYS Group(const Linear& p, int64_t block, int64_t group) {
    const uint8_t* index = static_cast<const uint8_t*>(p.index) + (block * p.groups + group) * ROWS;
    const __m512i one = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    const __m512i lowest = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    select = _mm512_shuffle_epi8(one, lowest);
    const __m512i exponent = _mm512_and_si512(one, _mm512_set1_epi32(15));
    unit = _mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(BYTE_UNIT + LOWEST_EXPONENT - 127)), 23);
  }
};

// 64 weights out of the low halves of codes.
DUOTONE_ALWAYS __m512i decode(const Table& table, const Group& group, __m512i codes) {
  constexpr int choose = 0xE2;  // the first where the second has a one, else the third
  const __m512i at = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(15), group.select, choose);
  return _mm512_permutex2var_epi8(table.first, at, table.second);
}

// Adds 4 columns of 16 rows times 4 columns of a token. Written out so that the four are read by the multiplication itself and
// sums stay in their registers: compilers do either in one build and not in the next, which costs a third of the speed.
DUOTONE_ALWAYS __m512i multiply(__m512i sum, __m512i w, const int8_t* x) {
  struct Four {
    int8_t columns[4];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Four*>(x)));
  return sum;
}

// Adds a segment's integer sums, as float32, to totals. Units and scales are powers of two: nothing rounds there.
DUOTONE_ALWAYS __m512 add_segment(__m512 total, __m512i sum, __m512i unit, float scale) {
  int32_t exponent;
  __builtin_memcpy(&exponent, &scale, 4);
  const __m512 both = _mm512_castsi512_ps(_mm512_add_epi32(unit, _mm512_set1_epi32(exponent)));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total);
}

// Sums of TOKENS tokens over the columns of a segment.
template <int TOKENS>
struct Sums {
  static constexpr int CHAINS = TOKENS == 1 ? 2 : 1;  // a token's sums, so that no addition waits for the one before
  __m512i high[TOKENS][CHAINS], low[TOKENS][CHAINS];

  // Begins with what the biases add, taken away.
  DUOTONE_ALWAYS explicit Sums(const Segment* of) {
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++)
      for (int c = 0; c < CHAINS; c++)
        high[t][c] = _mm512_setzero_si512(), low[t][c] = c ? _mm512_setzero_si512() : _mm512_set1_epi32(of[t].high_sum);
  }
  // 4 columns of weights, the first or second of a step, times tokens `bytes` apart.
  template <int half>
  DUOTONE_ALWAYS void add(__m512i w, const int8_t* x, int64_t bytes) {
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      const int8_t* digits = x + t * bytes + half * 8;
      high[t][half % CHAINS] = multiply(high[t][half % CHAINS], w, digits);
      low[t][half % CHAINS] = multiply(low[t][half % CHAINS], w, digits + 4);
    }
  }
  // To totals [TOKENS][16], as float32.
  DUOTONE_ALWAYS void finish(const Segment* of, __m512i unit, float* total) {
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      for (int c = 1; c < CHAINS; c++)
        high[t][0] = _mm512_add_epi32(high[t][0], high[t][c]), low[t][0] = _mm512_add_epi32(low[t][0], low[t][c]);
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[t][0], 8), low[t][0]);
      _mm512_store_ps(total + t * ROWS, add_segment(_mm512_load_ps(total + t * ROWS), sum, unit, of[t].scale));
    }
  }
};

const uint8_t* codes_of(const Linear& p, int64_t block, int64_t s) {
  return p.codes + (block * p.chunks + s * p.segment_chunks) * CHUNK_STEPS * STEP_BYTES;
}
const int8_t* digits_of(const Linear& p, int64_t s, int64_t token) {
  return reinterpret_cast<const int8_t*>(p.high) + p.at(s, token) * 2;
}

// What the shift of a segment cut off: seldom anything, and then in few steps.
__attribute__((noinline)) __m512 add_low(const Linear& p, int64_t block, int64_t s, int64_t token, __m512 total) {
  const Table table(p);
  const Group group(p, block, s / p.group_segments);
  const Segment& of = p.of(s, token);
  const uint8_t* codes = codes_of(p, block, s);
  const int8_t* x = reinterpret_cast<const int8_t*>(p.low) + p.at(s, token);
  __m512i sum = _mm512_set1_epi32(of.low_sum);
  for (uint32_t left = of.low_parts; left; left &= left - 1) {
    const int64_t i = __builtin_ctz(left);
    const __m512i both = _mm512_loadu_si512(codes + i * STEP_BYTES);
    sum = multiply(sum, decode(table, group, both), x + i * STEP);
    sum = multiply(sum, decode(table, group, _mm512_srli_epi16(both, 4)), x + i * STEP + 4);
  }
  return add_segment(total, sum, group.unit, LOW_SCALE);
}

// Totals of a block, with what was cut off, to where they belong.
DUOTONE_ALWAYS void put(const Linear& p, int64_t block, int64_t token, int64_t count, const float* total) {
  for (int64_t t = token; t < token + count; t++, total += ROWS) {
    __m512 sum = _mm512_load_ps(total);
    p.each_low(t, [&](int64_t s) { sum = add_low(p, block, s, t, sum); });
    _mm512_storeu_ps(p.total + t * p.stride() + block * ROWS, sum);
  }
}

// A block of rows times TOKENS tokens: weights are decoded and never stored.
template <int TOKENS>
DUOTONE_ALWAYS void direct(const Linear& p, const Table& table, int64_t block, int64_t token) {
  alignas(64) float total[TOKENS * ROWS] = {};
  const uint8_t* codes = codes_of(p, block, 0);
  for (int64_t s = 0; s < p.segments; s++) {
    const Group group(p, block, s / p.group_segments);
    const int64_t steps = p.chunks_of(s) * CHUNK_STEPS;
    const int8_t* x = digits_of(p, s, token);
    const Segment* of = &p.of(s, token);
    Sums<TOKENS> sums(of);
    const auto step = [&](int64_t i) __attribute__((always_inline)) {
      __builtin_prefetch(codes + AHEAD), __builtin_prefetch(codes + FAR_AHEAD, 0, 2);
      const __m512i both = _mm512_loadu_si512(codes);
      codes += STEP_BYTES;
      sums.template add<0>(decode(table, group, both), x + i * STEP * 2, steps * STEP * 2);
      sums.template add<1>(decode(table, group, _mm512_srli_epi16(both, 4)), x + i * STEP * 2, steps * STEP * 2);
    };
    if (TOKENS <= 4)
      for (int64_t i = 0; i < steps; i += 2) step(i), step(i + 1);
    else
      for (int64_t i = 0; i < steps; i++) step(i);
    sums.finish(of, group.unit, total);
  }
  put(p, block, token, TOKENS, total);
}

void few(const Linear& p, int64_t begin, int64_t end) {
  const Table table(p);
  for (int64_t block = begin; block < end; block++) {
    int64_t t = 0;
    for (; t + MOST <= p.tokens; t += MOST) direct<MOST>(p, table, block, t);
    if (t + 4 <= p.tokens) direct<4>(p, table, block, t), t += 4;
    if (p.tokens - t == 3) direct<3>(p, table, block, t);
    if (p.tokens - t == 2) direct<2>(p, table, block, t);
    if (p.tokens - t == 1) direct<1>(p, table, block, t);
  }
}

// Decoded weights of a block, columns of some segments, [steps][2 halves][64 bytes], and units.
struct Panel {
  alignas(64) int8_t weights[PART * ROWS];
  __m512i unit[PART / CHUNK];
};

DUOTONE_ALWAYS void fill(const Linear& p, int64_t block, int64_t first, int64_t last, Panel& panel) {
  const Table table(p);
  int8_t* to = panel.weights;
  for (int64_t s = first; s < last; s++) {
    const Group group(p, block, s / p.group_segments);
    const uint8_t* codes = codes_of(p, block, s);
    for (int64_t i = 0; i < p.chunks_of(s) * CHUNK_STEPS; i++, codes += STEP_BYTES, to += 2 * STEP_BYTES) {
      __builtin_prefetch(codes + p.chunks * CHUNK_STEPS * STEP_BYTES, 0, 2);  // of the next block
      const __m512i both = _mm512_loadu_si512(codes);
      _mm512_store_si512(to, decode(table, group, both));
      _mm512_store_si512(to + STEP_BYTES, decode(table, group, _mm512_srli_epi16(both, 4)));
    }
    panel.unit[s - first] = group.unit;
  }
}

// A panel times TOKENS tokens, added to their totals.
template <int TOKENS>
void tile(const Linear& p, const Panel& panel, int64_t token, int64_t first, int64_t last, float* total) {
  const int8_t* w = panel.weights;
  for (int64_t s = first; s < last; s++) {
    const int64_t steps = p.chunks_of(s) * CHUNK_STEPS;
    const int8_t* x = digits_of(p, s, token);
    const Segment* of = &p.of(s, token);
    Sums<TOKENS> sums(of);
    const int8_t* ahead = s + 1 < last ? digits_of(p, s + 1, token) : x;  // at as many lines of cache as there are steps
    for (int64_t i = 0; i < steps; i++, w += 2 * STEP_BYTES) {
      for (int j = 0; j < TOKENS / 4; j++) __builtin_prefetch(ahead + (i * (TOKENS / 4) + j) * 64);
      sums.template add<0>(_mm512_load_si512(w), x + i * STEP * 2, steps * STEP * 2);
      sums.template add<1>(_mm512_load_si512(w + STEP_BYTES), x + i * STEP * 2, steps * STEP * 2);
    }
    sums.finish(of, panel.unit[s - first], total);
  }
}

// A block of rows times tokens [token, end) over segments [from, to): decoded once for all of them, in panels that stay in the
// first level of cache.
void many(const Linear& p, int64_t block, int64_t token, int64_t end, int64_t from, int64_t to) {
  Panel panel;
  alignas(64) float total[TOKEN_BLOCK * ROWS];
  float* kept = p.total + token * p.stride() + block * ROWS;
  for (int64_t t = 0; t < end - token; t++)
    _mm512_store_ps(total + t * ROWS, from ? _mm512_loadu_ps(kept + t * p.stride()) : _mm512_setzero_ps());
  const int64_t part = PART / (p.segment_chunks * CHUNK);
  for (int64_t first = from; first < to; first += part) {
    const int64_t last = first + part < to ? first + part : to;
    fill(p, block, first, last, panel);
    int64_t t = token;
    for (; t + MOST <= end; t += MOST) tile<MOST>(p, panel, t, first, last, total + (t - token) * ROWS);
    for (; t + 4 <= end; t += 4) tile<4>(p, panel, t, first, last, total + (t - token) * ROWS);
    for (; t < end; t++) tile<1>(p, panel, t, first, last, total + (t - token) * ROWS);
  }
  if (to == p.segments) return put(p, block, token, end - token, total);
  for (int64_t t = 0; t < end - token; t++) _mm512_storeu_ps(kept + t * p.stride(), _mm512_load_ps(total + t * ROWS));
}

void run(const Linear& p, int64_t begin, int64_t end) {
  begin /= COLUMN_ROWS / BLOCK_ROWS, end = (end + 1) / (COLUMN_ROWS / BLOCK_ROWS);
  if (p.tokens <= FEW) return few(p, begin, end);
  // In parts whose activations stay in the second level of cache while all rows pass by.
  const int64_t part = CACHED / (p.segment_chunks * CHUNK);
  for (int64_t token = 0; token < p.tokens; token += TOKEN_BLOCK)
    for (int64_t from = 0; from < p.segments; from += part)
      for (int64_t block = begin; block < end; block++)
        many(p, block, token, token + p.together(token), from, from + part < p.segments ? from + part : p.segments);
}

// ---- Activations.

DUOTONE_ALWAYS __m512 wide(const uint16_t* x, __mmask16 which) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, x)), 16));
}
DUOTONE_ALWAYS __m512 wide(const float* x, __mmask16 which) { return _mm512_maskz_loadu_ps(which, x); }

// fp8_round of solver_kernels.h.
DUOTONE_ALWAYS __m512 fp8(__m512 x) {
  const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7F800000));
  const __m512i power = _mm512_max_epi32(exponent, _mm512_set1_epi32((127 - 6) << 23));
  const __m512 shift = _mm512_mul_ps(_mm512_castsi512_ps(power), _mm512_set1_ps(1572864.0f));
  return _mm512_sub_ps(_mm512_add_ps(x, shift), shift);
}

DUOTONE_ALWAYS void store(int8_t* to, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes); }

template <typename T>
DUOTONE_ALWAYS float split_token(const Linear& p, const T* x, int64_t token) {
  const int64_t columns = p.in_features;
  const auto part = [&](int64_t k) { return static_cast<__mmask16>(columns - k >= 16 ? 0xFFFF : columns > k ? (1 << (columns - k)) - 1 : 0); };
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most = _mm512_setzero_si512();  // without their sign, floats rise with their bits, NaN above all
  for (int64_t k = 0; k < columns; k += 16)
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(wide(x + k, part(k))), magnitude));
  const Activations of = activations(p, static_cast<uint32_t>(_mm512_reduce_max_epi32(most)));
  const __m512 scale = _mm512_set1_ps(of.scale), largest = _mm512_set1_ps(p.fp8_max);
  const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), largest);
  for (int64_t s = 0, k = 0; s < p.segments; s++) {
    const int64_t chunks = p.chunks_of(s), at = p.at(s, token);
    __m512i value[SEGMENT_CHUNKS * 2], high_sum = _mm512_setzero_si512(), low_sum = high_sum, top = high_sum;
    for (int64_t i = 0; i < chunks * 2; i++, k += 16) {
      const __m512 scaled = _mm512_div_ps(wide(x + k, part(k)), scale);
      const __m512 grid = fp8(_mm512_min_ps(_mm512_max_ps(scaled, least), largest));
      const __m512i whole = _mm512_cvttps_epi32(_mm512_mul_ps(grid, _mm512_set1_ps(1.0f / LOW_SCALE)));
      value[i] = of.number ? whole : _mm512_setzero_si512();
      top = _mm512_max_epi32(top, _mm512_abs_epi32(value[i]));
    }
    const unsigned shift = shift_of(_mm512_reduce_max_epi32(top));
    Segment found{LOW_SCALE * static_cast<float>(1 << shift), 0, 0, 0};
    int8_t* high = reinterpret_cast<int8_t*>(p.high) + at * 2;
    int8_t* low = reinterpret_cast<int8_t*>(p.low) + at;
    for (int64_t i = 0; i < chunks * 2; i++) {
      const __m512i above = _mm512_srai_epi32(value[i], shift), below = _mm512_sub_epi32(value[i], _mm512_slli_epi32(above, shift));
      high_sum = _mm512_add_epi32(high_sum, above), low_sum = _mm512_add_epi32(low_sum, below);
      const __m128i small = _mm512_cvtepi32_epi8(above);
      const __m128i big = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(above, _mm512_set1_epi32(128)), 8));
      store(high + i * 32, _mm_unpacklo_epi32(big, small)), store(high + i * 32 + 16, _mm_unpackhi_epi32(big, small));
      if (!shift) continue;
      store(low + i * 16, _mm512_cvtepi32_epi8(below));
      const uint32_t any = _mm512_test_epi32_mask(below, below);
      found.low_parts |= ((any & 0xFF) != 0 ? uint32_t{1} : 0) << i * 2 | (any >> 8 != 0 ? uint32_t{2} : 0) << i * 2;
    }
    found.high_sum = -_mm512_reduce_add_epi32(high_sum) * p.bias, found.low_sum = -_mm512_reduce_add_epi32(low_sum) * p.bias;
    p.put(s, token, found);
  }
  return of.scale;
}

float split_bf16(const Linear& p, const uint16_t* x, int64_t token) { return split_token(p, x, token); }
float split_float(const Linear& p, const float* x, int64_t token) { return split_token(p, x, token); }

}  // namespace

const LinearPath linear_avx512vbmi = {split_bf16, split_float, run};

}  // namespace duotone

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace duotone {
const LinearPath linear_avx512vbmi = {nullptr, nullptr, nullptr};
}
#endif
