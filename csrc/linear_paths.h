// Included by one file for each instruction set, behind the pragma that turns it on: no standard header may be included here,
// or its inline functions would be compiled for that set and taken by everybody. AVX2 is the least; V brings what is wider.
#pragma once

#include "linear_kernels.h"

#define DUOTONE_ALWAYS static inline __attribute__((always_inline))

namespace duotone {
namespace {

constexpr int64_t PAIRS = CHUNK / 2;                                 // of columns, in a chunk
constexpr int64_t PANEL_ROWS = 16;                                   // decoded at once
constexpr int64_t CACHED_COLUMNS = 2048;                             // of TOKEN_BLOCK tokens, 256 KiB
constexpr int64_t AHEAD = 2048;                                      // bytes of codes to fetch ahead
constexpr int64_t USUAL_CHUNKS = 4;                                  // of a segment: a group of 128 columns

DUOTONE_ALWAYS const __m256i* wide(const void* from) { return static_cast<const __m256i*>(from); }

// A block's rows in one group.
template <class Number>
struct Rows {
  const Sixteen* table;
  const Number* number;

  inline __attribute__((always_inline)) Rows(const Linear& p, int64_t block, int64_t group)
      : table(p.table), number(static_cast<const Number*>(p.index) + (block * p.groups + group) * BLOCK_ROWS) {}

  inline __attribute__((always_inline)) const Sixteen& row(int i) const { return table[number[i]]; }
  inline __attribute__((always_inline)) __m256 unit(const Linear& p) const {
    if (sizeof(Number) == 1 && p.byte_units) {  // the exponent of an FP8 byte, in its place in a float
      const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(number)));
      const __m256i exponent = _mm256_slli_epi32(_mm256_and_si256(byte, _mm256_set1_epi32(0x78)), 20);
      return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(BYTE_UNIT << 23)));
    }
    return _mm256_setr_ps(row(0).unit, row(1).unit, row(2).unit, row(3).unit, row(4).unit, row(5).unit, row(6).unit, row(7).unit);
  }
  inline __attribute__((always_inline)) __m256i bias() const {
    return _mm256_setr_epi32(row(0).bias, row(1).bias, row(2).bias, row(3).bias, row(4).bias, row(5).bias, row(6).bias,
                             row(7).bias);
  }
  // What the biases add to sums of products with values whose sum is x_sum.
  inline __attribute__((always_inline)) __m256i biased(const Linear& p, int32_t x_sum) const {
    const __m256i x = _mm256_set1_epi32(x_sum);
    return p.bias >= 0 ? x : _mm256_mullo_epi32(bias(), x);
  }
  // The values of rows `i` and `i + 4`.
  inline __attribute__((always_inline)) __m256i pair(int i) const {
    const auto sixteen = [](const Sixteen& of) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(of.value)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(row(i))), sixteen(row(i + 4)), 1);
  }
};

// Adds a segment's integer sums of eight rows, as float32, to their totals. Units and scales are powers of two: nothing rounds
// there.
DUOTONE_ALWAYS __m256 add_segment(__m256 total, __m256i sum, __m256i biased, __m256 unit, float scale) {
  const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, biased));
  return _mm256_fmadd_ps(_mm256_mul_ps(exact, _mm256_set1_ps(scale)), unit, total);
}

// The four sums of each row of four pairs of rows, added up: rows in order.
DUOTONE_ALWAYS __m256i rows_of(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
}

template <class V, class Number>
struct Kernel {
  using I = typename V::I;
  using Block = Rows<Number>;
  static constexpr int REGS = BLOCK_BYTES / sizeof(I);  // registers that hold the codes of a block's chunk
  static constexpr int WIDE = PANEL_ROWS * 4 / sizeof(I);

  // Adds a chunk of COUNT registers, from register FIRST on, times TOKENS tokens to `sum`, or begins it.
  template <bool BEGINS, int TOKENS, int FIRST, int COUNT>
  DUOTONE_ALWAYS void chunk(const uint8_t* codes, const int16_t* const* x, int64_t at, const I* value, I (*sum)[COUNT]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
      for (int r = 0; r < COUNT; r++) {
        const I both = V::load(codes + (FIRST + r) * sizeof(I));
        const I bytes = V::lookup(value[FIRST + r], V::nibbles(half ? V::shift(both, 4) : both));
        const I even = V::even(bytes), odd = V::shift(bytes, 8);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
          const I first = V::eight(x[t] + at + half * 16);
          sum[t][r] = BEGINS && !half ? V::product(even, first) : V::madd(sum[t][r], even, first);
          sum[t][r] = V::madd(sum[t][r], odd, V::eight(x[t] + at + half * 16 + 8));
        }
      }
  }

  // A segment's sums of COUNT registers, stored one after the other.
  template <int TOKENS, int FIRST, int COUNT>
  DUOTONE_ALWAYS void segment(const uint8_t* codes, int64_t chunks, const int16_t* const* x, const I* value,
                              __m256i (*to)[4]) {
    I sum[TOKENS][COUNT];
    __builtin_prefetch(codes + AHEAD), __builtin_prefetch(codes + AHEAD + 64);
    chunk<true, TOKENS, FIRST, COUNT>(codes, x, 0, value, sum);
    const auto next = [&](int64_t c) __attribute__((always_inline)) {
      __builtin_prefetch(codes + c * BLOCK_BYTES + AHEAD), __builtin_prefetch(codes + c * BLOCK_BYTES + AHEAD + 64);
      chunk<false, TOKENS, FIRST, COUNT>(codes + c * BLOCK_BYTES, x, c * CHUNK, value, sum);
    };
    if (TOKENS == 1 && chunks == USUAL_CHUNKS)
      next(1), next(2), next(3);
    else
      for (int64_t c = 1; c < chunks; c++) next(c);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
      for (int r = 0; r < COUNT; r++) V::store(reinterpret_cast<I*>(to[t]) + FIRST + r, sum[t][r]);
  }

  // A block of rows and all tokens, up to four: weights are decoded into registers and never stored.
  template <int TOKENS>
  DUOTONE_ALWAYS void direct(const Linear& p, int64_t block) {
    __m256 total[TOKENS];
    for (int t = 0; t < TOKENS; t++) total[t] = _mm256_setzero_ps();
    const uint8_t* codes = p.codes + block * p.chunks * BLOCK_BYTES;
    const int16_t* high = p.high;
    const Segment* of = p.segment;
    int64_t group = 0, left = p.group_segments;
    for (int64_t s = 0, rest = p.chunks; s < p.segments; s++, rest -= p.segment_chunks, of += TOKENS) {
      const Block rows(p, block, group);
      I value[REGS];
      V::values(rows, value);
      const int64_t chunks = rest < p.segment_chunks ? rest : p.segment_chunks;
      const int16_t* x[TOKENS];
      __m256i sum[TOKENS][4];
      for (int t = 0; t < TOKENS; t++) x[t] = high + t * chunks * CHUNK;
      if constexpr (TOKENS * REGS <= 4) {
        segment<TOKENS, 0, REGS>(codes, chunks, x, value, sum);
      } else {
        segment<TOKENS, 0, REGS / 2>(codes, chunks, x, value, sum);
        segment<TOKENS, REGS / 2, REGS / 2>(codes, chunks, x, value, sum);
      }
      const __m256 unit = rows.unit(p);
      for (int t = 0; t < TOKENS; t++) {
        const __m256i rows_sum = rows_of(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
        total[t] = add_segment(total[t], rows_sum, rows.biased(p, of[t].high_sum), unit, of[t].scale);
      }
      if (!--left) group++, left = p.group_segments;
      codes += chunks * BLOCK_BYTES, high += TOKENS * chunks * CHUNK;
    }
    for (int t = 0; t < TOKENS; t++) {
      p.each_low(t, [&](int64_t s) { total[t] = add_low(p, block, s, t, total[t]); });
      _mm256_storeu_ps(p.total + t * p.stride() + block * BLOCK_ROWS, total[t]);
    }
  }

  // What the shift of a segment cut off: seldom anything, and then in few chunks.
  static __attribute__((noinline)) __m256 add_low(const Linear& p, int64_t block, int64_t s, int64_t token, __m256 total) {
    const Block rows(p, block, s / p.group_segments);
    const uint8_t* codes = p.codes + (block * p.chunks + s * p.segment_chunks) * BLOCK_BYTES;
    const int16_t* x = p.low + p.at(s, token);
    const Segment& of = p.of(s, token);
    I value[REGS], sum[1][REGS];
    V::values(rows, value);
    __m256i stored[4];
    for (int r = 0; r < REGS; r++) sum[0][r] = V::zero();
    for (uint32_t left = of.low_parts; left; left &= left - 1) {
      const int64_t c = __builtin_ctz(left);
      chunk<false, 1, 0, REGS>(codes + c * BLOCK_BYTES, &x, c * CHUNK, value, sum);
    }
    for (int r = 0; r < REGS; r++) V::store(reinterpret_cast<I*>(stored) + r, sum[0][r]);
    const __m256i rows_sum = rows_of(stored[0], stored[1], stored[2], stored[3]);
    return add_segment(total, rows_sum, rows.biased(p, of.low_sum), rows.unit(p), LOW_SCALE);
  }

  // Decodes a segment of a block into eight lanes of a panel, [pair of columns][16 rows][2 columns], from lane `lane` on.
  static void fill_panel(const uint8_t* codes, int64_t chunks, const Block& rows, int16_t* panel, int64_t lane) {
    const __m256i low_half = _mm256_set1_epi8(15), low_byte = _mm256_set1_epi16(255);
    int16_t* to = panel + lane * 2;
    for (int64_t c = 0; c < chunks; c++, codes += BLOCK_BYTES) {
      __builtin_prefetch(codes + AHEAD), __builtin_prefetch(codes + AHEAD + 64);
      for (int half = 0; half < 2; half++) {
        __m256i bytes[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          const __m256i both = _mm256_loadu_si256(wide(codes) + r);
          bytes[r] = _mm256_shuffle_epi8(rows.pair(r), _mm256_and_si256(half ? _mm256_srli_epi16(both, 4) : both, low_half));
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
          __m256i w[4];
#pragma GCC unroll 4
          for (int r = 0; r < 4; r++) w[r] = odd ? _mm256_srli_epi16(bytes[r], 8) : _mm256_and_si256(bytes[r], low_byte);
          const __m256i a = _mm256_unpacklo_epi32(w[0], w[1]), b = _mm256_unpacklo_epi32(w[2], w[3]);
          const __m256i d = _mm256_unpackhi_epi32(w[0], w[1]), e = _mm256_unpackhi_epi32(w[2], w[3]);
          const __m256i four[4] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b), _mm256_unpacklo_epi64(d, e),
                                   _mm256_unpackhi_epi64(d, e)};
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++, to += PANEL_ROWS * 2) _mm256_store_si256(reinterpret_cast<__m256i*>(to), four[i]);
        }
      }
    }
  }

  // The sums of a panel's 16 rows over pairs of columns, for TOKENS tokens whose values begin at x, `columns` apart.
  template <int TOKENS>
  DUOTONE_ALWAYS void multiply(const int16_t* panel, const int16_t* x, int64_t columns, int64_t pairs, I (*sum)[WIDE]) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < pairs; j++) {
      I w[WIDE];
#pragma GCC unroll 4
      for (int i = 0; i < WIDE; i++) w[i] = V::aligned(panel + j * PANEL_ROWS * 2 + i * sizeof(I) / 2);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) {
        const I two = V::two(x + t * columns + j * 2);
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) sum[t][i] = V::madd(sum[t][i], w[i], two);
      }
    }
  }

  // TOKENS tokens times a segment's panel, added to their totals [TOKENS][16].
  template <int TOKENS>
  static void tile(const Linear& p, const int16_t* panel, int64_t token, int64_t s, const __m256i* bias, const __m256* unit,
                   float* total) {
    const int64_t first = p.at(s, token), columns = p.chunks_of(s) * CHUNK;
    I sum[TOKENS][WIDE];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
      for (int i = 0; i < WIDE; i++) sum[t][i] = V::zero();
    multiply<TOKENS>(panel, p.high + first, columns, columns / 2, sum);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const Segment& of = p.of(s, token + t);
      add_panel(p, sum[t], bias, unit, of.high_sum, of.scale, total + t * PANEL_ROWS);
    }
  }

  DUOTONE_ALWAYS void add_panel(const Linear& p, const I* sum, const __m256i* bias, const __m256* unit, int32_t x_sum,
                                float scale, float* total) {
    const __m256i x = _mm256_set1_epi32(x_sum);
    alignas(64) __m256i eight[2];
    for (int i = 0; i < WIDE; i++) V::store(reinterpret_cast<I*>(eight) + i, sum[i]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const __m256i biased = p.bias >= 0 ? x : _mm256_mullo_epi32(bias[i], x);
      _mm256_store_ps(total + i * 8, add_segment(_mm256_load_ps(total + i * 8), eight[i], biased, unit[i], scale));
    }
  }

  // One or two blocks of rows times tokens [begin, end) over segments [first, last): weights are decoded once for all of them.
  static void many(const Linear& p, int64_t block, int64_t blocks, int64_t begin, int64_t end, int64_t first, int64_t last) {
    alignas(64) int16_t panel[SEGMENT_CHUNKS * PAIRS * PANEL_ROWS * 2];
    alignas(64) float total[TOKEN_BLOCK * PANEL_ROWS];
    const auto each = [&](auto&& call) {
      for (int64_t t = 0; t < end - begin; t++)
        for (int64_t b = 0; b < blocks; b++)
          call(p.total + (begin + t) * p.stride() + (block + b) * BLOCK_ROWS, total + t * PANEL_ROWS + b * BLOCK_ROWS);
    };
    if (first) each([](const float* from, float* to) { _mm256_store_ps(to, _mm256_loadu_ps(from)); });
    else __builtin_memset(total, 0, sizeof total);
    for (int64_t s = first; s < last; s++) {
      __m256i bias[2];
      __m256 unit[2];
      for (int64_t b = 0; b < 2; b++) {  // without a second block the first stands in its place, and goes nowhere
        const int64_t of = block + (b < blocks ? b : 0);
        const Block rows(p, of, s / p.group_segments);
        const uint8_t* codes = p.codes + (of * p.chunks + s * p.segment_chunks) * BLOCK_BYTES;
        bias[b] = rows.bias(), unit[b] = rows.unit(p);
        fill_panel(codes, p.chunks_of(s), rows, panel, b * BLOCK_ROWS);
      }
      int64_t t = begin;
      for (; t + V::TILE <= end; t += V::TILE) tile<V::TILE>(p, panel, t, s, bias, unit, total + (t - begin) * PANEL_ROWS);
      for (; t + 2 <= end; t += 2) tile<2>(p, panel, t, s, bias, unit, total + (t - begin) * PANEL_ROWS);
      for (; t < end; t++) tile<1>(p, panel, t, s, bias, unit, total + (t - begin) * PANEL_ROWS);
    }
    each([](float* to, const float* from) { _mm256_storeu_ps(to, _mm256_load_ps(from)); });
    if (last < p.segments) return;
    for (int64_t t = begin; t < end; t++)
      p.each_low(t, [&](int64_t s) {
        for (int64_t of = block; of < block + blocks; of++) {
          float* to = p.total + t * p.stride() + of * BLOCK_ROWS;
          _mm256_storeu_ps(to, add_low(p, of, s, t, _mm256_loadu_ps(to)));
        }
      });
  }

  template <int TOKENS>
  static void few(const Linear& p, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) direct<TOKENS>(p, block);
  }

  static void run(const Linear& p, int64_t begin, int64_t end) {
    switch (p.tokens) {
      case 1: return few<1>(p, begin, end);
      case 2: return few<2>(p, begin, end);
      case 3: return few<3>(p, begin, end);
      case 4: return few<4>(p, begin, end);
      default: break;
    }
    // Tokens and columns in parts whose activations stay in the second level of cache while all rows pass by.
    const int64_t part = CACHED_COLUMNS / (p.segment_chunks * CHUNK);
    for (int64_t token = 0; token < p.tokens; token += TOKEN_BLOCK)
      for (int64_t first = 0; first < p.segments; first += part) {
        const int64_t tokens = token + TOKEN_BLOCK < p.tokens ? token + TOKEN_BLOCK : p.tokens;
        const int64_t last = first + part < p.segments ? first + part : p.segments;
        for (int64_t block = begin; block < end; block += 2)
          many(p, block, end - block < 2 ? 1 : 2, token, tokens, first, last);
      }
  }
};

// All a path is.
template <class V>
void run_path(const Linear& p, int64_t begin, int64_t end) {
  p.wide_index ? Kernel<V, uint16_t>::run(p, begin, end) : Kernel<V, uint8_t>::run(p, begin, end);
}

}  // namespace
}  // namespace duotone
