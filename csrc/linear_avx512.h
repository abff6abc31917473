// What both AVX-512 paths share; included behind their pragmas, as linear_paths.h is.
#pragma once

#include "linear_paths.h"

namespace duotone {
namespace {

struct Registers512 {
  using I = __m512i;
  static constexpr int TILE = 8;
  static inline I zero() { return _mm512_setzero_si512(); }
  static inline I load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static inline I aligned(const int16_t* from) { return _mm512_load_si512(from); }
  static inline void store(I* to, I value) { _mm512_storeu_si512(to, value); }
  template <class R>
  static inline void values(const R& rows, I* value) {
    for (int i = 0; i < 2; i++)
      value[i] = _mm512_inserti64x4(_mm512_castsi256_si512(rows.pair(2 * i)), rows.pair(2 * i + 1), 1);
  }
  static inline I nibbles(I codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  static inline I shift(I words, unsigned bits) { return _mm512_srli_epi16(words, bits); }
  static inline I even(I bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi16(255)); }
  static inline I lookup(I value, I nibble) { return _mm512_shuffle_epi8(value, nibble); }
  static inline I eight(const int16_t* x) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static inline I product(I w, I x) { return _mm512_madd_epi16(w, x); }
  static inline I two(const int16_t* x) {
    int32_t both;
    __builtin_memcpy(&both, x, 4);
    return _mm512_set1_epi32(both);
  }
};

}  // namespace
}  // namespace duotone
