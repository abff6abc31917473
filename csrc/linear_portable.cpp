// The W4A8 linear for any machine: the same steps on arrays, which the compiler vectorizes as far as it can. It is also what
// the layout with four rows a register is tested with where there is no AVX-512.
#include <cstdint>
#include <cstring>

#include "linear_paths.h"

namespace duotone {
namespace {

struct Portable {
  struct F {
    float at[16];
  };
  struct I {
    uint8_t at[64];
  };
  static constexpr int REG_ROWS = 4, TOKENS = 2;
  static inline F zero() { return F{}; }
  static inline F add(F a, F b) {
    for (int i = 0; i < 16; i++) a.at[i] += b.at[i];
    return a;
  }
  static inline F fma(F a, F b, F c) {  // products of FP8 values are exact: nothing is lost by two steps
    for (int i = 0; i < 16; i++) c.at[i] += a.at[i] * b.at[i];
    return c;
  }
  static inline F fetch(const float* from) {
    F value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static inline void store(float* to, const F& value) { std::memcpy(to, &value, sizeof value); }
  static inline F broadcast(const float* four) {
    F value;
    for (int r = 0; r < 4; r++) std::memcpy(value.at + 4 * r, four, 16);
    return value;
  }
  static inline I load(const uint8_t* bytes) {
    I value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
  }
  static inline I gather(const uint8_t* const* rows, int at) {
    I value;
    for (int r = 0; r < 4; r++) std::memcpy(value.at + 16 * r, rows[r] + at, 16);
    return value;
  }
  static inline I low_nibbles(I codes) {
    for (int i = 0; i < 64; i++) codes.at[i] &= 15;
    return codes;
  }
  static inline I high_nibbles(I codes) {
    for (int i = 0; i < 64; i++) codes.at[i] >>= 4;
    return codes;
  }
  static inline I lookup(const I& table, I nibble) {
    for (int i = 0; i < 64; i++) nibble.at[i] = table.at[i / 16 * 16 + nibble.at[i]];
    return nibble;
  }
  static inline I interleave(const I& a, const I& b, int half) {
    I words;
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 8; i++) {
        words.at[16 * r + 2 * i] = a.at[16 * r + half + i];
        words.at[16 * r + 2 * i + 1] = b.at[16 * r + half + i];
      }
    return words;
  }
  static inline I interleave_low(const I& a, const I& b) { return interleave(a, b, 0); }
  static inline I interleave_high(const I& a, const I& b) { return interleave(a, b, 8); }
  static inline F widen(const I& words, int at) {
    F value;
    for (int i = 0; i < 16; i++) {
      const uint32_t low = words.at[4 * i + at], high = words.at[4 * i + at + 1], bits = high << 24 | low << 16;
      std::memcpy(value.at + i, &bits, 4);
    }
    return value;
  }
  static inline F even(const I& words) { return widen(words, 0); }
  static inline F odd(const I& words) { return widen(words, 2); }
  static inline void reduce(const F& sum, float* to) {  // of each row: (0 + 1) + (2 + 3)
    for (int r = 0; r < 4; r++) to[r] = (sum.at[4 * r] + sum.at[4 * r + 1]) + (sum.at[4 * r + 2] + sum.at[4 * r + 3]);
  }
};

}  // namespace

const LinearPath linear_portable = Kernel<Portable>::run;

}  // namespace duotone
