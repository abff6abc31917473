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
constexpr int MOST = 8, FEW = 4;                        // tokens that a decoded weight meets; so few that sums stay in registers
constexpr int64_t PART = 2048;                           // columns of MOST tokens that stay in the first level of cache
constexpr int64_t AHEAD = 8192, FAR_AHEAD = 24576;       // bytes of codes to fetch ahead, into the first and second level of cache

struct Table {
  __m512i first, second;

  DUOTONE_ALWAYS explicit Table(const Linear& p)
      : first(_mm512_loadu_si512(p.by_mantissa)), second(_mm512_loadu_si512(p.by_mantissa + 64)) {}
};

// Sixteen rows of a group: which row of the table each byte of a step is in, and units.
struct Group {
  __m512i select;
  __m512 unit;

  DUOTONE_ALWAYS Group(const Linear& p, int64_t block, int64_t group) {
    const uint8_t* index = static_cast<const uint8_t*>(p.index) + (block * p.groups + group) * ROWS;
    const __m512i one = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    const __m512i lowest = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C));
    select = _mm512_shuffle_epi8(one, lowest);
    const __m512i exponent = _mm512_and_si512(one, _mm512_set1_epi32(15));
    const __m512i biased = _mm512_add_epi32(exponent, _mm512_set1_epi32(BYTE_UNIT + LOWEST_EXPONENT));
    unit = _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
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
#if defined(DUOTONE_EMULATED)
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(word));
#else
  struct Four {
    int8_t columns[4];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Four*>(x)));
  return sum;
#endif
}

// Adds a segment's integer sums, as float32, to totals. Units and scales are powers of two: nothing rounds there.
DUOTONE_ALWAYS __m512 add_segment(__m512 total, __m512i sum, int32_t biased, __m512 unit, float scale) {
  const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(biased)));
  return _mm512_fmadd_ps(_mm512_mul_ps(exact, _mm512_set1_ps(scale)), unit, total);
}

// What the shift of a segment cut off: seldom anything, and then in few steps.
__attribute__((noinline)) __m512 add_low(const Linear& p, int64_t block, int64_t s, int64_t token, __m512 total) {
  const Table table(p);
  const Group group(p, block, s / p.group_segments);
  const Segment& of = p.of(s, token);
  const uint8_t* codes = p.codes + (block * p.chunks + s * p.segment_chunks) * CHUNK_STEPS * STEP_BYTES;
  const int8_t* x = reinterpret_cast<const int8_t*>(p.low) + p.at(s, token);
  __m512i sum = _mm512_setzero_si512();
  for (uint32_t left = of.low_parts; left; left &= left - 1) {
    const int64_t i = __builtin_ctz(left);
    const __m512i both = _mm512_loadu_si512(codes + i * STEP_BYTES);
    sum = multiply(sum, decode(table, group, both), x + i * STEP);
    sum = multiply(sum, decode(table, group, _mm512_srli_epi16(both, 4)), x + i * STEP + 4);
  }
  return add_segment(total, sum, of.low_sum, group.unit, LOW_SCALE);
}

// A block of rows times TOKENS tokens over segments [first, last), added to `total` [TOKENS][16]. `far` bytes on in the codes is
// what will be read later.
template <int TOKENS>
DUOTONE_ALWAYS void tile(const Linear& p, int64_t block, int64_t token, int64_t first, int64_t last, float* total, int64_t far) {
  constexpr int CHAINS = TOKENS == 1 ? 2 : 1;  // a token's sums, so that no addition waits for the one before
  const Table table(p);
  const uint8_t* codes = p.codes + (block * p.chunks + first * p.segment_chunks) * CHUNK_STEPS * STEP_BYTES;
  int64_t number = first / p.group_segments, left = p.group_segments - first % p.group_segments;
  for (int64_t s = first; s < last; s++) {
    const Group group(p, block, number);
    const int64_t steps = p.chunks_of(s) * CHUNK_STEPS, bytes = steps * STEP * 2;
    const int8_t* x = reinterpret_cast<const int8_t*>(p.high) + p.at(s, token) * 2;
    __m512i high[TOKENS][CHAINS], low[TOKENS][CHAINS];
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++)
      for (int c = 0; c < CHAINS; c++) high[t][c] = low[t][c] = _mm512_setzero_si512();
    const auto step = [&](int64_t i) __attribute__((always_inline)) {
      if (TOKENS <= FEW) __builtin_prefetch(codes + AHEAD);
      __builtin_prefetch(codes + far, 0, 2);
      const __m512i both = _mm512_loadu_si512(codes);
      codes += STEP_BYTES;
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m512i w = decode(table, group, half ? _mm512_srli_epi16(both, 4) : both);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; t++) {
          const int8_t* digits = x + t * bytes + i * STEP * 2 + half * 8;
          high[t][half % CHAINS] = multiply(high[t][half % CHAINS], w, digits);
          low[t][half % CHAINS] = multiply(low[t][half % CHAINS], w, digits + 4);
        }
      }
    };
    if (TOKENS <= FEW)
      for (int64_t i = 0; i < steps; i += 2) step(i), step(i + 1);
    else
      for (int64_t i = 0; i < steps; i++) step(i);
    const Segment* of = &p.of(s, token);
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      for (int c = 1; c < CHAINS; c++)
        high[t][0] = _mm512_add_epi32(high[t][0], high[t][c]), low[t][0] = _mm512_add_epi32(low[t][0], low[t][c]);
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[t][0], 8), low[t][0]);
      const __m512 before = _mm512_load_ps(total + t * ROWS);
      _mm512_store_ps(total + t * ROWS, add_segment(before, sum, of[t].high_sum, group.unit, of[t].scale));
    }
    if (!--left) number++, left = p.group_segments;
  }
}

// TOKENS tokens times blocks of rows [begin, end) over segments [first, last).
template <int TOKENS>
void blocks(const Linear& p, int64_t begin, int64_t end, int64_t token, int64_t first, int64_t last) {
  alignas(64) float total[TOKENS * ROWS];
  const bool whole = last - first == p.segments;  // then the next block's codes come after this one's
  const int64_t far = whole ? FAR_AHEAD : p.chunks * CHUNK_STEPS * STEP_BYTES;
  for (int64_t block = begin; block < end; block++) {
    float* to = p.total + token * p.stride() + block * ROWS;
    for (int t = 0; t < TOKENS; t++)
      _mm512_store_ps(total + t * ROWS, first ? _mm512_loadu_ps(to + t * p.stride()) : _mm512_setzero_ps());
    tile<TOKENS>(p, block, token, first, last, total, far);
    for (int t = 0; t < TOKENS; t++) {
      __m512 sum = _mm512_load_ps(total + t * ROWS);
      if (last == p.segments) p.each_low(token + t, [&](int64_t s) { sum = add_low(p, block, s, token + t, sum); });
      _mm512_storeu_ps(to + t * p.stride(), sum);
    }
  }
}

void run(const Linear& p, int64_t begin, int64_t end) {
  begin /= COLUMN_ROWS / BLOCK_ROWS, end = (end + 1) / (COLUMN_ROWS / BLOCK_ROWS);
  int64_t part = p.tokens <= MOST ? p.segments : PART / (p.segment_chunks * CHUNK);
  if (part < 1) part = 1;
  for (int64_t some = 0; some < p.tokens; some += TOKEN_BLOCK)
    for (int64_t first = 0; first < p.segments; first += part) {
      const int64_t to = some + TOKEN_BLOCK < p.tokens ? some + TOKEN_BLOCK : p.tokens;
      const int64_t last = first + part < p.segments ? first + part : p.segments;
      int64_t t = some;
      for (; t + MOST <= to; t += MOST) blocks<MOST>(p, begin, end, t, first, last);
      for (; t + 4 <= to; t += 4) blocks<4>(p, begin, end, t, first, last);
      if (to - t == 1) blocks<1>(p, begin, end, t, first, last);
      if (to - t == 2) blocks<2>(p, begin, end, t, first, last);
      if (to - t == 3) blocks<3>(p, begin, end, t, first, last);
    }
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
    found.high_sum = _mm512_reduce_add_epi32(high_sum) * p.bias, found.low_sum = _mm512_reduce_add_epi32(low_sum) * p.bias;
    p.of(s, token) = found;
    if (found.low_parts) p.low_segments[token * p.low_words() + s / 64] |= uint64_t{1} << s % 64;
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
