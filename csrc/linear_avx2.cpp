// The W4A8 linear for AVX2 and FMA: two rows of a block in a register.
#include <cstdint>
#include <cstring>

#include "linear_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#include "linear_paths.h"

namespace duotone {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int REG_ROWS = 2, TOKENS = 3;
  static inline F zero() { return _mm256_setzero_ps(); }
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline F fetch(const float* from) { return _mm256_load_ps(from); }
  static inline void store(float* to, F value) { _mm256_store_ps(to, value); }
  static inline F broadcast(const float* four) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)); }
  static inline I load(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
  static inline __m128i sixteen(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }
  static inline I gather(const uint8_t* const* rows, int at) {
    return _mm256_set_m128i(sixteen(rows[1] + at), sixteen(rows[0] + at));
  }
  static inline I low_nibbles(I codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
  static inline I high_nibbles(I codes) { return _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15)); }
  static inline I lookup(I table, I nibble) { return _mm256_shuffle_epi8(table, nibble); }
  static inline I interleave_low(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
  static inline I interleave_high(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
  static inline F even(I words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
  static inline F odd(I words) { return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x10000))); }
  static inline void reduce(F sum, float* to) {  // of each row: (0 + 1) + (2 + 3)
    const F pairs = _mm256_hadd_ps(sum, sum), fours = _mm256_hadd_ps(pairs, pairs);
    to[0] = _mm_cvtss_f32(_mm256_castps256_ps128(fours));
    to[1] = _mm_cvtss_f32(_mm256_extractf128_ps(fours, 1));
  }
};

}  // namespace

const LinearPath linear_avx2 = Kernel<Avx2>::run;

}  // namespace duotone

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace duotone {
const LinearPath linear_avx2 = nullptr;
}
#endif
