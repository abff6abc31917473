// Products over the tokens of a call, left^T right, of BF16 numbers in float32: how each instruction set does a tile of them.
#pragma once

#include <cstdint>

namespace duotone {

constexpr int64_t PANEL = 64;         // columns that lie together
constexpr int64_t TOKEN_PAIRS = 256;  // of a chunk: a panel of it stays in the second level of cache

// Adds to a tile [PANEL, PANEL] what `pairs` pairs of tokens bring.
// left, right: panels [pairs][PANEL][2 tokens].
using AddTile = void (*)(const uint16_t* left, const uint16_t* right, int64_t pairs, float* tile);

void add_tile_portable(const uint16_t* left, const uint16_t* right, int64_t pairs, float* tile);
// Null where the compiler does not know the instructions.
extern const AddTile add_tile_avx512bf16;

}  // namespace duotone
