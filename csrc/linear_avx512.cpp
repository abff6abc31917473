// The W4A8 linear for AVX-512: all four rows of a block in a register.
#include <cstdint>
#include <cstring>

#include "linear_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#include "linear_paths.h"

namespace duotone {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int REG_ROWS = 4, TOKENS = 6;
  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline F fetch(const float* from) { return _mm512_load_ps(from); }
  static inline void store(float* to, F value) { _mm512_store_ps(to, value); }
  static inline F broadcast(const float* four) { return _mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
  static inline I load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static inline __m128i sixteen(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }
  static inline I gather(const uint8_t* const* rows, int at) {
    const __m256i low = _mm256_set_m128i(sixteen(rows[1] + at), sixteen(rows[0] + at));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_set_m128i(sixteen(rows[3] + at), sixteen(rows[2] + at)), 1);
  }
  static inline I low_nibbles(I codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  static inline I high_nibbles(I codes) { return _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15)); }
  static inline I lookup(I table, I nibble) { return _mm512_shuffle_epi8(table, nibble); }
  static inline I interleave_low(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
  static inline I interleave_high(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
  static inline F even(I words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static inline F odd(I words) { return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000))); }
  static inline void reduce(F sum, float* to) {  // of each row: (0 + 1) + (2 + 3)
    const F pairs = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    const F fours = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4E));
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, fours)));
  }
};

}  // namespace

const LinearPath linear_avx512 = Kernel<Avx512>::run;

}  // namespace duotone

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace duotone {
const LinearPath linear_avx512 = nullptr;
}
#endif
