// Runs every vector path of the W4A8 linear on random problems and compares all bits with the portable one. Built by
// tests/kernels/test_emulated.py with SIMDe standing in for the instructions that this machine lacks.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "linear_kernels.h"

using namespace duotone;

namespace {

template <typename T>
T* zeros(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 8192) / 64 * 64;  // and what is fetched ahead
  void* memory = std::aligned_alloc(64, bytes);
  std::memset(memory, 0, bytes);
  return static_cast<T*>(memory);
}

int64_t below(int64_t count) { return std::rand() % count; }

// Values as they come, or with what a segment's shift cuts off in some chunks.
void fill_activations(const Linear& p, int16_t* high, int16_t* low) {
  for (int64_t i = 0; i < p.tokens * p.columns(); i++) high[i] = static_cast<int16_t>(below(60001) - 30000);
  for (int64_t s = 0; s < p.segments; s++)
    for (int64_t m = 0; m < p.tokens; m++) {
      Segment of{};
      of.scale = LOW_SCALE * static_cast<float>(1 << below(4));
      const int64_t at = p.at(s, m);
      for (int64_t k = 0; k < p.chunks_of(s) * CHUNK; k++) of.high_sum += high[at + k];
      for (int64_t c = 0; c < p.chunks_of(s) && s % 3 == 0; c++) {
        if (below(2)) continue;
        of.low_parts |= uint32_t{1} << c;
        for (int64_t k = at + c * CHUNK; k < at + (c + 1) * CHUNK; k++) of.low_sum += low[k] = static_cast<int16_t>(below(8));
      }
      if (p.bias >= 0) of.high_sum *= p.bias, of.low_sum *= p.bias;
      p.put(s, m, of);
    }
}

struct Named {
  const char* name;
  LinearPath path;
};

// Number of paths that differ.
int compare(Linear p) {
  uint8_t* codes = zeros<uint8_t>(p.blocks() * p.chunks * BLOCK_BYTES);
  const int64_t rows = p.byte_units ? 127 : 256, count = p.blocks() * p.groups * BLOCK_ROWS;
  uint16_t* index = zeros<uint16_t>(count);
  Sixteen* table = zeros<Sixteen>(256);
  int16_t *high = zeros<int16_t>(p.tokens * p.columns()), *low = zeros<int16_t>(p.tokens * p.columns());
  Segment* segment = zeros<Segment>(p.tokens * p.segments);
  float *meant = zeros<float>(p.tokens * p.stride()), *found = zeros<float>(p.tokens * p.stride());
  for (int64_t i = 0; i < p.blocks() * p.chunks * BLOCK_BYTES; i++) codes[i] = static_cast<uint8_t>(below(256));
  for (int64_t i = 0; i < count; i++) {
    if (p.wide_index) index[i] = static_cast<uint16_t>(below(rows));
    else reinterpret_cast<uint8_t*>(index)[i] = static_cast<uint8_t>(below(rows));
  }
  for (int i = 0; i < 256; i++) {
    for (uint8_t& value : table[i].value) value = static_cast<uint8_t>(below(256));
    table[i].unit = p.byte_units ? std::ldexp(1.0f, i / 8 + BYTE_UNIT - 127) : 1.0f / static_cast<float>(1 << below(10));
    table[i].bias = p.bias < 0 ? static_cast<int32_t>(below(256)) : p.bias;
  }
    p.codes = codes, p.index = index, p.table = table, p.high = high, p.low = low, p.segment = segment;
  p.low_segments = zeros<uint64_t>(p.tokens * p.low_words());
  fill_activations(p, high, low);
  p.total = meant;
  const size_t bytes = static_cast<size_t>(p.tokens * p.stride()) * sizeof(float);
  std::memset(meant, 255, bytes);
  linear_portable.run(p, 0, p.blocks());
  int wrong = 0;
  for (const Named& path :
       {Named{"avx2", linear_avx2}, Named{"avx512", linear_avx512}, Named{"avx512vnni", linear_avx512vnni}}) {
    std::memset(found, 255, bytes);
    p.total = found;
    path.path.run(p, 0, p.blocks());
    if (!std::memcmp(meant, found, bytes)) continue;
    std::printf("%s differs: %ld tokens, %ld rows, %ld chunks\n", path.name, static_cast<long>(p.tokens),
                static_cast<long>(p.rows), static_cast<long>(p.chunks));
    wrong++;
  }
  for (void* memory : std::initializer_list<void*>{codes, index, table, high, low, segment, p.low_segments, meant, found}) std::free(memory);
  return wrong;
}

}  // namespace

int main() {
  constexpr int64_t cases = 300, group_chunks[] = {1, 2, 4, 8, 11, 16}, segment_chunks[] = {1, 2, 4, 8, 1, 8};
  int wrong = 0;
  for (int64_t i = 0; i < cases; i++) {
    Linear p{};
    p.tokens = 1 + below(70), p.rows = 1 + below(60), p.chunks = 1 + below(30), p.bias = below(2) ? 128 : -1;
    p.wide_index = below(2), p.byte_units = !p.wide_index && below(2);
    p.groups = (p.chunks + group_chunks[i % 6] - 1) / group_chunks[i % 6], p.segment_chunks = segment_chunks[i % 6];
    p.segments = (p.chunks + p.segment_chunks - 1) / p.segment_chunks;
    p.group_segments = group_chunks[i % 6] / p.segment_chunks;
    wrong += compare(p);
  }
  std::printf("%ld problems, %d differ\n", static_cast<long>(cases), wrong);
  return wrong != 0;
}
