// The W4A8 linear for AVX2 and FMA: two rows of a block in a register.
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
  using I = __m256i;
  static constexpr int TILE = 4;
  static inline I zero() { return _mm256_setzero_si256(); }
  static inline I load(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const I*>(bytes)); }
  static inline I aligned(const int16_t* from) { return _mm256_load_si256(reinterpret_cast<const I*>(from)); }
  static inline void store(I* to, I value) { _mm256_store_si256(to, value); }
  template <class R>
  static inline void values(const R& rows, I* value) {
    for (int i = 0; i < 4; i++) value[i] = rows.pair(i);
  }
  static inline I nibbles(I codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
  static inline I shift(I words, int bits) { return _mm256_srli_epi16(words, bits); }
  static inline I even(I bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi16(255)); }
  static inline I lookup(I value, I nibble) { return _mm256_shuffle_epi8(value, nibble); }
  static inline I eight(const int16_t* x) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static inline I two(const int16_t* x) {
    int32_t both;
    __builtin_memcpy(&both, x, 4);
    return _mm256_set1_epi32(both);
  }
  static inline I product(I w, I x) { return _mm256_madd_epi16(w, x); }
  static inline I madd(I sum, I w, I x) {
    // Written out so that the sum stays in its register: compilers copy it on, which costs a tenth of the speed.
    const I product = _mm256_madd_epi16(w, x);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
    return sum;
  }
};

}  // namespace

const LinearPath linear_avx2 = {split_words, split_words, run_path<Avx2>};

}  // namespace duotone

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace duotone {
const LinearPath linear_avx2 = {nullptr, nullptr, nullptr};
}
#endif
