// The W4A8 linear on plain pointers, in integers. M tokens, N out_features, K in_features, G groups along K.
//
// What an FP8 product of a group can be is 16 values, each a whole number of units of the smallest step among them, and all of
// them within 255 units: FP8 has four significant bits, and no code is more than 15 times another. A group needs 16 bytes
// (values plus a bias that makes them positive), one byte shuffle looks up 32 codes, and a unit, which is a power of two.
// FP8 activations are whole numbers of 2^-9, of 18 bits. A segment of columns is shifted right until it fits 16; what falls
// off is not 0 only where a value is 2^11 times smaller than the segment's largest, and is multiplied apart, in `low`.
// So sums over a segment are integers, exact, and in any order the same: 16 x 16 bits multiply at twice the rate of float32.
// Each becomes a float32, and these are added first to last, then those of what was cut off. That is all the rounding there is,
// and it is the same for any number of tokens and threads and on any path.
//
// Layout: codes [N/8][C][4][2 rows][16 bytes], C chunks of 32 columns; the two rows of a pair are 4 apart. Byte 2j + p of a row
// holds column 8p + j in its low half and 16 + 8p + j in its high half, so that even and odd bytes become 8 columns each.
#pragma once

#include <cstdint>
#include <cstring>

namespace duotone {

constexpr int64_t BLOCK_ROWS = 8, CHUNK = 32, CHUNK_BYTES = 16, BLOCK_BYTES = BLOCK_ROWS * CHUNK_BYTES, TABLE_BYTES = 32;
constexpr int64_t COLUMN_ROWS = 16, COLUMN_STEP = 8;  // of a block and a step in the layout of linear_avx512vbmi.cpp
constexpr int64_t TOKEN_BLOCK = 64;    // tokens that a decoded weight meets before the next one is
constexpr int64_t SEGMENT_CHUNKS = 8;  // at most: 256 columns of 255 units by 15 bits stay below 2^31

// What a token has in a segment beside its values.
struct Segment {
  float scale;          // of `high`, a power of two
  int32_t high_sum, low_sum;  // times the bias that all rows have in common, if they do
  uint32_t low_parts;   // bit by bit, where `low` is not zero: which chunks, or steps in linear_avx512vbmi.cpp
};

// A row of the table.
struct Sixteen {
  uint8_t value[16];
  float unit;
  int32_t bias;
  uint8_t spare[8];
};
static_assert(sizeof(Sixteen) == TABLE_BYTES);

struct Linear {
  int64_t in_features, tokens, rows, chunks, groups, segment_chunks, segments;
  int64_t group_segments;  // a group's
  const uint8_t* codes;
  const void* index;  // [N/8][G][8]: which row of the table
  bool wide_index;    // uint16 instead of uint8
  const Sixteen* table;
  int32_t bias;       // of all rows of the table, or -1 where they differ
  bool byte_units;    // row r of the table is that of the FP8 byte r: its unit is 2^(r / 8 + BYTE_UNIT - 127)
  const uint8_t* by_mantissa;  // [8][16], in place of a table, where a path has its own layout
  float input_scale;  // static, or 0 for one a token
  float fp8_max, smallest_scale;
  int16_t *high, *low;  // [M/64][segments][up to 64 tokens][columns of a segment]: what is read together lies together
  Segment* segment;     // [M/64][segments][up to 64 tokens]
  uint64_t* low_segments;  // [M][low_words()], bit by bit: which segments have any low_parts
  float* total;         // [M][16 ceil(N/16)]: sums before any scale

  int64_t blocks() const { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
  int64_t stride() const { return (blocks() + 1) / 2 * 2 * BLOCK_ROWS; }
  int64_t columns() const { return chunks * CHUNK; }
  int64_t chunks_of(int64_t s) const {
    return chunks - s * segment_chunks < segment_chunks ? chunks - s * segment_chunks : segment_chunks;
  }
  // Where a token's values of a segment begin.
  int64_t at(int64_t s, int64_t token) const {
    const int64_t first = token / TOKEN_BLOCK * TOKEN_BLOCK;
    return first * columns() + (s * segment_chunks * together(first) + (token - first) * chunks_of(s)) * CHUNK;
  }
  Segment& of(int64_t s, int64_t token) const {
    const int64_t first = token / TOKEN_BLOCK * TOKEN_BLOCK;
    return segment[first * segments + s * together(first) + token - first];
  }
  int64_t low_words() const { return (segments + 63) / 64; }
  // What a path found in a segment of a token; the first comes first.
  void put(int64_t s, int64_t token, const Segment& found) const {
    of(s, token) = found;
    uint64_t& word = low_segments[token * low_words() + s / 64];
    word = (s % 64 ? word : 0) | static_cast<uint64_t>(found.low_parts != 0) << s % 64;
  }
  // Calls with each segment of a token that has low parts, first to last.
  template <class F>
  inline __attribute__((always_inline)) void each_low(int64_t token, F&& call) const {
    const uint64_t* words = low_segments + token * low_words();
    for (int64_t i = 0; i < low_words(); i++)
      for (uint64_t left = words[i]; left; left &= left - 1) call(i * 64 + __builtin_ctzll(left));
  }
  int64_t together(int64_t first) const { return tokens - first < TOKEN_BLOCK ? tokens - first : TOKEN_BLOCK; }
};

constexpr float LOW_SCALE = 0x1p-9f;  // the step of FP8
constexpr int32_t BYTE_UNIT = 127 - 10, LOWEST_EXPONENT = -2;

// A token's scale, NaN for one that holds what is no number, from the bits of its largest value without a sign.
struct Activations {
  float scale;
  bool number;
};
inline Activations activations(const Linear& p, uint32_t largest) {
  constexpr uint32_t infinity = 0x7F800000u;
  float scale = p.input_scale;
  const bool number = scale == 0.0f ? largest < infinity : largest <= infinity;  // a static scale clamps infinities
  if (scale == 0.0f) {
    std::memcpy(&scale, &largest, 4);
    scale /= p.fp8_max;
    scale = scale < p.smallest_scale ? p.smallest_scale : scale;
  }
  return {number ? scale : __builtin_nanf(""), number};
}

// How far a segment of whole numbers is shifted right to fit 16 bits.
inline int shift_of(int32_t largest) {
  int shift = 0;
  while (largest >> shift > INT16_MAX) shift++;
  return shift;
}

// What a path brings: a token put on the FP8 grid and split into segments, which returns its scale; and the sums of all tokens
// for blocks of rows [begin, end). All null where the path is not compiled in. All give the same bits.
struct LinearPath {
  float (*split_bf16)(const Linear&, const uint16_t* x, int64_t token);
  float (*split_float)(const Linear&, const float* x, int64_t token);
  void (*run)(const Linear&, int64_t begin, int64_t end);
};
extern const LinearPath linear_portable, linear_avx2, linear_avx512, linear_avx512vnni, linear_avx512vbmi;

// Activations as 16-bit numbers, in the order of columns: of all paths but the last.
float split_words(const Linear& p, const uint16_t* x, int64_t token);
float split_words(const Linear& p, const float* x, int64_t token);

}  // namespace duotone
