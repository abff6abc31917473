// The W4A8 linear for any machine: plain loops, which the compiler vectorizes as far as it can.
#include "linear_kernels.h"

namespace duotone {
namespace {

constexpr int64_t WIDEST = SEGMENT_CHUNKS * CHUNK;

const Sixteen& row_of(const Linear& p, int64_t at) {
  return p.table[p.wide_index ? static_cast<const uint16_t*>(p.index)[at] : static_cast<const uint8_t*>(p.index)[at]];
}

// A row's bytes of `chunks` chunks as 16-bit integers.
void decode(const uint8_t* codes, int64_t chunks, const uint8_t* value, int16_t* w) {
  for (int64_t c = 0; c < chunks; c++, codes += BLOCK_BYTES, w += CHUNK)
    for (int i = 0; i < CHUNK_BYTES; i++) {
      const int column = i % 2 * 8 + i / 2;
      w[column] = value[codes[i] & 15], w[column + 16] = value[codes[i] >> 4];
    }
}

int32_t dot(const int16_t* w, const int16_t* x, int64_t columns) {
  int32_t sum = 0;
  for (int64_t k = 0; k < columns; k++) sum += static_cast<int32_t>(w[k]) * x[k];
  return sum;
}

void run(const Linear& p, int64_t begin, int64_t end) {
  int16_t w[WIDEST];
  for (int64_t block = begin; block < end; block++)
    for (int64_t r = 0; r < BLOCK_ROWS; r++) {
      float* total = p.total + block * BLOCK_ROWS + r;
      for (int64_t m = 0; m < p.tokens; m++) total[m * p.stride()] = 0.0f;
      const auto add = [&](int64_t s, int64_t begin, int64_t end, bool low) {
        const int64_t first = s * p.segment_chunks, chunks = p.chunks_of(s);
        const Sixteen& sixteen = row_of(p, (block * p.groups + s / p.group_segments) * BLOCK_ROWS + r);
        const uint8_t* codes = p.codes + (block * p.chunks + first) * BLOCK_BYTES + (r % 4 * 2 + r / 4) * CHUNK_BYTES;
        const int32_t bias = p.bias < 0 ? sixteen.bias : 1;  // a common one is in the sums
        decode(codes, chunks, sixteen.value, w);
        for (int64_t m = begin; m < end; m++) {
          const Segment& of = p.of(s, m);
          const int32_t sum = dot(w, (low ? p.low : p.high) + p.at(s, m), chunks * CHUNK);
          const int32_t exact = sum - bias * (low ? of.low_sum : of.high_sum);
          total[m * p.stride()] += static_cast<float>(exact) * (low ? LOW_SCALE : of.scale) * sixteen.unit;
        }
      };
      for (int64_t s = 0; s < p.segments; s++) add(s, 0, p.tokens, false);
      for (int64_t m = 0; m < p.tokens; m++) p.each_low(m, [&](int64_t s) { add(s, m, m + 1, true); });
    }
}

}  // namespace

const LinearPath linear_portable = {split_words, split_words, run};

}  // namespace duotone
