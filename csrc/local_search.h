// One row's codes improved one at a time, as solver/local_search.py says. Plain pointers, no torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "floats.h"
#include "solver_kernels.h"

// What returns a vector here is inlined: no call has to agree on how.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace duotone {

template <typename Weight>    // float, or BF16 as bits
struct LocalSearch : Rows {  // codes: [N, K], improved in place
  int64_t steps, tenure;
  int64_t padded;         // columns of a row of `hessian`: K and zeros to whole SCANs
  const float* gradient;  // [N, K]
  const Weight* hessian;  // [K, padded]
  const float* damping;   // [K]
};

constexpr int SCAN = 16;  // lanes of the scan for the best move

struct Move {
  int32_t column;  // -1 where there was none
  float code;      // the one before
};

struct Search {
  template <typename Weight>
  explicit Search(const LocalSearch<Weight>& s)
      : gradient(s.padded), curvature(s.padded), up(s.padded), down(s.padded), code(s.columns), moves(s.steps) {
    for (int64_t k = 0; k < s.columns; k++) curvature[k] = widen(s.hessian[k * s.padded + k]) + s.damping[k];
  }
  std::vector<float> gradient, curvature;  // (w - v) H, and H's diagonal
  std::vector<float> up, down;             // to the next value of the table and to the one before; infinite where there is none
  std::vector<float> code;
  std::vector<Move> moves;
};

template <typename Weight>
DUOTONE_INLINE void open_column(const LocalSearch<Weight>& s, Search& t, int64_t row, int64_t k) {
  const Values values = values_of(s, row, k);
  const float level = t.code[k] + s.lowest, value = values.at(level).value;
  const float up = level < values.high ? values.at(level + 1.0f).value - value : 0.0f;
  const float down = level > values.low ? values.at(level - 1.0f).value - value : 0.0f;
  const bool counts = t.curvature[k] != 0.0f;
  t.up[k] = up == 0.0f || !counts ? INFINITY : up;
  t.down[k] = down == 0.0f || !counts ? INFINITY : down;
}

// The column that moved in a step may move again.
template <typename Weight>
DUOTONE_INLINE void end_rest(const LocalSearch<Weight>& s, Search& t, int64_t row, int64_t step) {
  if (step >= 0 && t.moves[step].column >= 0) open_column(s, t, row, t.moves[step].column);
}

// What a move by d costs: d (d h - 2 g). An infinite d costs an infinity, or nothing comparable where h is zero.
template <typename T>
DUOTONE_INLINE T cost(T d, T h, T g) {
  return d * (d * h - (g + g));
}

// Vectors by name: the best moves so far have to stay in registers, and arrays that are written under a condition do not.
typedef float Floats __attribute__((vector_size(SCAN * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(SCAN * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(SCAN * sizeof(uint16_t))));

DUOTONE_INLINE void take(Floats& into, const float* from) { std::memcpy(&into, from, sizeof(Floats)); }
DUOTONE_INLINE void take(Floats& into, const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(Halves));
  const Ints wide = __builtin_convertvector(halves, Ints) << 16;
  std::memcpy(&into, &wide, sizeof(Floats));
}

// The gradient after a move by `step`, and in the same pass the column of the cheapest next one; -1 when there is none.
// Of equal costs the first column's counts.
template <typename Weight>
DUOTONE_INLINE int64_t scan(const LocalSearch<Weight>& s, Search& t, const Weight* weights, float step) {
  Floats best, g, h, up, down, weight;
  Ints at{}, here;
  for (int q = 0; q < SCAN; q++) best[q] = INFINITY, here[q] = q;
  for (int64_t k = 0; k < s.padded; k += SCAN, here += SCAN) {
    take(g, &t.gradient[k]), take(h, &t.curvature[k]), take(up, &t.up[k]), take(down, &t.down[k]), take(weight, weights + k);
    g = g - step * weight;
    std::memcpy(&t.gradient[k], &g, sizeof(Floats));
    const Floats rise = cost(up, h, g), fall = cost(down, h, g);
    const Floats least = rise < fall ? rise : fall;
    const Ints better = least < best;
    best = better ? least : best;
    at = better ? here : at;
  }
  float least = INFINITY;
  for (int q = 0; q < SCAN; q++) least = best[q] < least ? best[q] : least;
  int32_t column = INT32_MAX;
  for (int q = 0; q < SCAN; q++) column = best[q] == least && at[q] < column ? at[q] : column;
  return least < INFINITY ? column : -1;
}

template <typename Weight>
DUOTONE_INLINE void search_row(const LocalSearch<Weight>& s, Search& t, int64_t row) {
  uint8_t* codes = s.codes + row * s.columns;
  std::fill(t.up.begin(), t.up.end(), INFINITY);
  std::fill(t.down.begin(), t.down.end(), INFINITY);
  std::fill(t.gradient.begin(), t.gradient.end(), 0.0f);
  std::memcpy(t.gradient.data(), s.gradient + row * s.columns, sizeof(float) * s.columns);
  for (int64_t k = 0; k < s.columns; k++) {
    t.code[k] = static_cast<float>(codes[k]);
    open_column(s, t, row, k);
  }
  double total = 0.0, least = 0.0;
  int64_t done = 0, kept = 0;
  float step = 0.0f;
  const Weight* weights = s.hessian;
  for (; done < s.steps; done++) {
    const int64_t k = scan(s, t, weights, step);
    if (k < 0) {  // all rest: a step goes by
      t.moves[done] = {-1, 0.0f}, step = 0.0f;
      end_rest(s, t, row, done - s.tenure);
      continue;
    }
    const float h = t.curvature[k], g = t.gradient[k], rise = cost(t.up[k], h, g), fall = cost(t.down[k], h, g);
    const bool up = rise < fall;
    step = up ? t.up[k] : t.down[k];
    total += static_cast<double>(up ? rise : fall);
    t.moves[done] = {static_cast<int32_t>(k), t.code[k]};
    t.code[k] += up ? 1.0f : -1.0f;
    t.up[k] = t.down[k] = INFINITY;
    end_rest(s, t, row, done - s.tenure);
    weights = s.hessian + k * s.padded;
    t.gradient[k] -= step * s.damping[k];
    if (total < least) least = total, kept = done + 1;
  }
  while (done > kept) {
    done--;
    if (t.moves[done].column >= 0) t.code[t.moves[done].column] = t.moves[done].code;
  }
  for (int64_t k = 0; k < s.columns; k++) codes[k] = static_cast<uint8_t>(static_cast<int32_t>(t.code[k]));
}

template <typename Weight>
DUOTONE_INLINE void search_all(const LocalSearch<Weight>& s, int64_t first, int64_t last) {
  Search search(s);
  for (int64_t row = first; row < last; row++) search_row(s, search, row);
}

DUOTONE_CLONES void search_rows(const LocalSearch<float>& s, int64_t first, int64_t last) { search_all(s, first, last); }
DUOTONE_CLONES void search_rows_bf16(const LocalSearch<uint16_t>& s, int64_t first, int64_t last) { search_all(s, first, last); }

}  // namespace duotone
