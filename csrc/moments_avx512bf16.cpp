// Tiles of sums for AVX-512 with BF16: an instruction takes two tokens of 16 columns, in float32.
#include "moments.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#include <immintrin.h>

namespace duotone {
namespace {

constexpr int WIDE = PANEL / 16;  // registers of a row of the tile

// MR rows of the tile: their sums stay in registers over all tokens.
template <int MR>
inline __attribute__((always_inline)) void add_rows(const uint16_t* left, const uint16_t* right, int64_t pairs, float* tile) {
  __m512 total[MR][WIDE];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
    for (int j = 0; j < WIDE; j++) total[m][j] = _mm512_loadu_ps(tile + m * PANEL + 16 * j);
  for (int64_t k = 0; k < pairs; k++) {
    __m512i columns[WIDE];
    for (int j = 0; j < WIDE; j++) columns[j] = _mm512_loadu_si512(right + (k * PANEL + 16 * j) * 2);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      int32_t two;
      __builtin_memcpy(&two, left + (k * PANEL + m) * 2, 4);
      const __m512i row = _mm512_set1_epi32(two);
      for (int j = 0; j < WIDE; j++) total[m][j] = _mm512_dpbf16_ps(total[m][j], (__m512bh)row, (__m512bh)columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
    for (int j = 0; j < WIDE; j++) _mm512_storeu_ps(tile + m * PANEL + 16 * j, total[m][j]);
}

void add_tile(const uint16_t* left, const uint16_t* right, int64_t pairs, float* tile) {
  int64_t i = 0;
  for (; i + 6 <= PANEL; i += 6) add_rows<6>(left + 2 * i, right, pairs, tile + i * PANEL);
  add_rows<PANEL % 6>(left + 2 * i, right, pairs, tile + i * PANEL);
}

}  // namespace

const AddTile add_tile_avx512bf16 = add_tile;

}  // namespace duotone

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace duotone {
const AddTile add_tile_avx512bf16 = nullptr;
}
#endif
