// The W4A8 linear for AVX-512 with VNNI: product and sum are one instruction.
#include "linear_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
#include <immintrin.h>

#include "linear_avx512.h"

namespace duotone {
namespace {

struct Avx512Vnni : Registers512 {
  static inline I madd(I sum, I w, I x) { return _mm512_dpwssd_epi32(sum, w, x); }
};

}  // namespace

const LinearPath linear_avx512vnni = {split_words, split_words, run_path<Avx512Vnni>};

}  // namespace duotone

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace duotone {
const LinearPath linear_avx512vnni = {nullptr, nullptr, nullptr};
}
#endif
