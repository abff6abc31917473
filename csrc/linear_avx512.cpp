// The W4A8 linear for AVX-512: four rows of a block in a register.
#include "linear_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#include "linear_avx512.h"

namespace duotone {
namespace {

struct Avx512 : Registers512 {
  static inline I madd(I sum, I w, I x) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x)); }
};

}  // namespace

const LinearPath linear_avx512 = {split_words, split_words, run_path<Avx512>};

}  // namespace duotone

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace duotone {
const LinearPath linear_avx512 = {nullptr, nullptr, nullptr};
}
#endif
