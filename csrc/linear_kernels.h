// The W4A8 linear on plain pointers, for any vector instructions. M tokens, N out_features, K in_features, G groups along K.
//
// Every FP8 weight of a group is one of 16 values, so a group needs one row of a table of BF16 values, made by the contract.
// The two bytes of a value are looked up apart (16 entries fit a byte shuffle), and widened to float32, where products of FP8
// values are exact. A register holds REG_ROWS rows side by side, four columns of each; activations are broadcast to all.
//
// One order of summation, whatever the number of tokens, of threads, or the path: columns 8i..8i+3 of a row go to four sums,
// columns 8i+4..8i+7 to four others, i rising; then the two fours are added, and the four to one.
//
// Layout: codes [N/4][C][4 rows][16 bytes], C chunks of 32 columns. Byte 2j + p of the first eight holds column 4p + j in its
// low half and 16 more in its high half, the other eight bytes those 8 further on: what the interleaving of bytes needs to
// leave columns in their natural order.
#pragma once

#include <cstdint>
#include <cstring>

namespace duotone {

constexpr int64_t BLOCK_ROWS = 4, CHUNK = 32, CHUNK_BYTES = 16, TABLE_BYTES = 32;
constexpr int64_t PANEL_ROWS = 16, PANEL_CHUNKS = 8, TOKEN_BLOCK = 48;  // decoded at once, beside tokens that share them
constexpr int64_t AHEAD = 2048;  // bytes of codes to fetch ahead

struct Linear {
  int64_t tokens, rows, chunks, group_chunks, groups;
  const uint8_t* codes;
  const void* index;  // [N/4][G][4]: which row of the table
  bool wide_index;    // uint16 instead of uint8
  const uint8_t* table;  // [T][2][16]: low bytes of 16 BF16 values, then high bytes
  const float* x;        // [M][32 C] on the FP8 grid
  float* total;          // [M][4 ceil(N/4)]: sums before any scale

  int64_t blocks() const { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
};

// What a path brings: columns of rows [begin, end), in units of 4 rows.
using LinearPath = void (*)(const Linear&, int64_t begin, int64_t end);

// Null where the path is not compiled in. All give the same bits.
extern const LinearPath linear_portable, linear_avx2, linear_avx512;

}  // namespace duotone
