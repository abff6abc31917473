// Included by one file for each instruction set, behind the pragma that turns it on: no standard header may be included here,
// or its inline functions would be compiled for that set and taken by everybody.
#pragma once

#include "linear_kernels.h"

namespace duotone {
namespace {

template <class V>
struct Kernel {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int REGS = BLOCK_ROWS / V::REG_ROWS;           // registers that hold four columns of a block of rows
  static constexpr int FLOATS = 4 * V::REG_ROWS;                  // of a register
  static constexpr int PANEL_REGS = PANEL_ROWS / V::REG_ROWS;
  static constexpr int STEPS = CHUNK / 4;

  static inline __attribute__((always_inline)) const uint8_t* row_of(const Linear& p, int64_t at) {
    const int64_t row = p.wide_index ? static_cast<const uint16_t*>(p.index)[at] : static_cast<const uint8_t*>(p.index)[at];
    return p.table + row * TABLE_BYTES;
  }

  // The tables of a register's rows, unit after unit through the blocks, in one group.
  static inline __attribute__((always_inline)) void table(const Linear& p, int64_t unit, int64_t group, I& low, I& high) {
    const uint8_t* rows[V::REG_ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < V::REG_ROWS; i++)
      rows[i] = row_of(p, (unit / REGS * p.groups + group) * BLOCK_ROWS + unit % REGS * V::REG_ROWS + i);
    low = V::gather(rows, 0), high = V::gather(rows, 16);
  }

  // A register's first codes of a chunk.
  static inline __attribute__((always_inline)) const uint8_t* codes_of(const Linear& p, int64_t unit, int64_t chunk) {
    return p.codes + ((unit / REGS * p.chunks + chunk) * BLOCK_ROWS + unit % REGS * V::REG_ROWS) * CHUNK_BYTES;
  }

  // Values of half a chunk, 16 columns: four registers.
  static inline __attribute__((always_inline)) void decode(I codes, int half, I low, I high, F* w) {
    const I nibble = half ? V::high_nibbles(codes) : V::low_nibbles(codes);
    const I low_bytes = V::lookup(low, nibble), high_bytes = V::lookup(high, nibble);
    const I first = V::interleave_low(low_bytes, high_bytes), second = V::interleave_high(low_bytes, high_bytes);
    w[0] = V::even(first), w[1] = V::odd(first), w[2] = V::even(second), w[3] = V::odd(second);
  }

  // UNITS registers' rows, TOKENS tokens: weights are decoded into registers and never stored.
  template <int TOKENS, int UNITS>
  static inline __attribute__((always_inline)) void direct(const Linear& p, int64_t unit) {
    const int64_t columns = p.chunks * CHUNK, stride = p.blocks() * BLOCK_ROWS;
    const uint8_t* codes[UNITS];
    F sum[UNITS][TOKENS][2];
#pragma GCC unroll 4
    for (int u = 0; u < UNITS; u++) {
      codes[u] = codes_of(p, unit + u, 0);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++) sum[u][t][0] = sum[u][t][1] = V::zero();
    }
    const float* x = p.x;
    int64_t chunk = 0;
    for (int64_t group = 0; group < p.groups; group++) {
      I low[UNITS], high[UNITS];
#pragma GCC unroll 4
      for (int u = 0; u < UNITS; u++) table(p, unit + u, group, low[u], high[u]);
      const int64_t end = chunk + p.group_chunks < p.chunks ? chunk + p.group_chunks : p.chunks;
      for (; chunk < end; chunk++, x += CHUNK) {
#pragma GCC unroll 4
        for (int u = 0; u < UNITS; u++) __builtin_prefetch(codes[u] + AHEAD);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
          for (int u = 0; u < UNITS; u++) {
            F w[4];
            decode(V::load(codes[u]), half, low[u], high[u], w);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
#pragma GCC unroll 4
              for (int t = 0; t < TOKENS; t++)
                sum[u][t][q & 1] = V::fma(w[q], V::broadcast(x + t * columns + half * 16 + q * 4), sum[u][t][q & 1]);
          }
#pragma GCC unroll 4
        for (int u = 0; u < UNITS; u++) codes[u] += BLOCK_ROWS * CHUNK_BYTES;
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < UNITS; u++)
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++)
        V::reduce(V::add(sum[u][t][0], sum[u][t][1]), p.total + t * stride + (unit + u) * V::REG_ROWS);
  }

  // Few tokens: as many sums at a time as hide the latency of an addition and leave registers for the tables.
  template <int TOKENS>
  static void few(const Linear& p, int64_t unit, int64_t end) {
    constexpr int UNITS = TOKENS == 1 ? 2 : 1;
    for (; unit + UNITS <= end; unit += UNITS) direct<TOKENS, UNITS>(p, unit);
    for (; unit < end; unit++) direct<TOKENS, 1>(p, unit);
  }

  // Decodes PANEL_CHUNKS chunks of up to PANEL_REGS registers' rows: panel[register][chunk][step][FLOATS].
  static void fill_panel(const Linear& p, int64_t unit, int64_t units, int64_t chunk, int64_t chunks, float* panel) {
    for (int64_t u = 0; u < units; u++) {
      const uint8_t* codes = codes_of(p, unit + u, chunk);
      float* to = panel + u * PANEL_CHUNKS * STEPS * FLOATS;
      for (int64_t c = chunk; c < chunk + chunks;) {
        I low, high;
        table(p, unit + u, c / p.group_chunks, low, high);
        const int64_t of_group = (c / p.group_chunks + 1) * p.group_chunks;
        const int64_t end = of_group < chunk + chunks ? of_group : chunk + chunks;
        for (; c < end; c++, codes += BLOCK_ROWS * CHUNK_BYTES)
          for (int half = 0; half < 2; half++) {
            F w[4];
            decode(V::load(codes), half, low, high, w);
            for (int q = 0; q < 4; q++, to += FLOATS) V::store(to, w[q]);
          }
      }
    }
  }

  // Adds what `steps` steps of two registers of the panel bring TOKENS tokens to their sums [TOKENS][2 registers][2][FLOATS].
  template <int TOKENS>
  static inline __attribute__((always_inline)) void multiply(const float* w, const float* x, int64_t columns, int64_t steps,
                                                             float* sums, int64_t stride) {
    constexpr int64_t next = PANEL_CHUNKS * STEPS * FLOATS;
    F sum[TOKENS][2][2];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
      for (int r = 0; r < 2; r++)
        for (int o = 0; o < 2; o++) sum[t][r][o] = V::fetch(sums + t * stride + (r * 2 + o) * FLOATS);
    for (int64_t s = 0; s < steps; s += 2)
#pragma GCC unroll 2
      for (int o = 0; o < 2; o++) {
        const F first = V::fetch(w + (s + o) * FLOATS), second = V::fetch(w + next + (s + o) * FLOATS);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
          const F at = V::broadcast(x + t * columns + (s + o) * 4);
          sum[t][0][o] = V::fma(first, at, sum[t][0][o]);
          sum[t][1][o] = V::fma(second, at, sum[t][1][o]);
        }
      }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++)
      for (int r = 0; r < 2; r++)
        for (int o = 0; o < 2; o++) V::store(sums + t * stride + (r * 2 + o) * FLOATS, sum[t][r][o]);
  }

  // Up to PANEL_REGS registers' rows, many tokens: weights are decoded once for TOKEN_BLOCK tokens.
  static void many(const Linear& p, int64_t unit, int64_t units) {
    alignas(64) static thread_local float panel[PANEL_ROWS / V::REG_ROWS * PANEL_CHUNKS * STEPS * FLOATS];
    alignas(64) static thread_local float sums[TOKEN_BLOCK * PANEL_REGS * 2 * FLOATS];
    constexpr int64_t of_token = PANEL_REGS * 2 * FLOATS;
    const int64_t columns = p.chunks * CHUNK, stride = p.blocks() * BLOCK_ROWS;
    const int64_t pairs = (units + 1) / 2;
    for (int64_t first = 0; first < p.tokens; first += TOKEN_BLOCK) {
      const int64_t tokens = p.tokens - first < TOKEN_BLOCK ? p.tokens - first : TOKEN_BLOCK;
      __builtin_memset(sums, 0, sizeof(float) * tokens * of_token);
      for (int64_t chunk = 0; chunk < p.chunks; chunk += PANEL_CHUNKS) {
        const int64_t chunks = p.chunks - chunk < PANEL_CHUNKS ? p.chunks - chunk : PANEL_CHUNKS;
        fill_panel(p, unit, units, chunk, chunks, panel);
        const float* x = p.x + first * columns + chunk * CHUNK;
        for (int64_t t = 0; t < tokens; t += V::TOKENS)
          for (int64_t pair = 0; pair < pairs; pair++) {
            const float* w = panel + pair * 2 * PANEL_CHUNKS * STEPS * FLOATS;
            float* to = sums + t * of_token + pair * 4 * FLOATS;
            const int64_t count = tokens - t;
            const float* at = x + t * columns;
            if (count >= V::TOKENS) multiply<V::TOKENS>(w, at, columns, chunks * STEPS, to, of_token);
            else
              for (int64_t one = 0; one < count; one++)
                multiply<1>(w, at + one * columns, columns, chunks * STEPS, to + one * of_token, of_token);
          }
      }
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t u = 0; u < units; u++) {
          const float* from = sums + t * of_token + u * 2 * FLOATS;
          V::reduce(V::add(V::fetch(from), V::fetch(from + FLOATS)), p.total + (first + t) * stride + (unit + u) * V::REG_ROWS);
        }
    }
  }

  static void run(const Linear& p, int64_t begin, int64_t end) {
    begin *= REGS, end *= REGS;
    switch (p.tokens) {
      case 1: return few<1>(p, begin, end);
      case 2: return few<2>(p, begin, end);
      case 3: return few<3>(p, begin, end);
      case 4: return few<4>(p, begin, end);
      default: break;
    }
    for (int64_t unit = begin; unit < end; unit += PANEL_REGS) many(p, unit, end - unit < PANEL_REGS ? end - unit : PANEL_REGS);
  }
};

}  // namespace
}  // namespace duotone
