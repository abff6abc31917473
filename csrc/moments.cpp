// The op that adds up second moments of BF16 inputs, through torch's stable ABI. solver/statistics.py says what for.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include "moments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "crew.h"
#include "floats.h"
#include "tensors.h"

namespace duotone {

DUOTONE_CLONES void add_tile_portable(const uint16_t* left, const uint16_t* right, int64_t pairs, float* tile) {
  for (int64_t k = 0; k < pairs; k++)
    for (int64_t i = 0; i < PANEL; i++) {
      const float a = widen(left[(k * PANEL + i) * 2]), b = widen(left[(k * PANEL + i) * 2 + 1]);
      float* row = tile + i * PANEL;
      const uint16_t* columns = right + k * PANEL * 2;
      for (int64_t j = 0; j < PANEL; j++) row[j] += a * widen(columns[2 * j]) + b * widen(columns[2 * j + 1]);
    }
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

AddTile widest() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (add_tile_avx512bf16 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return add_tile_avx512bf16;
#endif
  return add_tile_portable;
}

// Columns of BF16 tokens in panels, [chunks][panels][pairs][PANEL][2 tokens]; what is not there is zero.
struct Panels {
  Panels(const uint16_t* data, int64_t tokens, int64_t columns)
      : data(data), tokens(tokens), columns(columns), count((columns + PANEL - 1) / PANEL),
        chunks((tokens + 2 * TOKEN_PAIRS - 1) / (2 * TOKEN_PAIRS)), packed(chunks * count * TOKEN_PAIRS * PANEL * 2) {}

  int64_t pairs(int64_t chunk) const { return std::min(TOKEN_PAIRS, (tokens - chunk * 2 * TOKEN_PAIRS + 1) / 2); }
  const uint16_t* at(int64_t chunk, int64_t panel) const { return &packed[(chunk * count + panel) * TOKEN_PAIRS * PANEL * 2]; }

  void pack(int64_t piece) {
    const int64_t chunk = piece / count, panel = piece % count, first = panel * PANEL;
    const int64_t width = std::min(PANEL, columns - first);
    uint16_t* to = &packed[piece * TOKEN_PAIRS * PANEL * 2];
    for (int64_t k = 0; k < pairs(chunk); k++, to += 2 * PANEL) {
      const int64_t token = chunk * 2 * TOKEN_PAIRS + 2 * k;
      const uint16_t *one = data + token * columns + first, *other = token + 1 < tokens ? one + columns : nullptr;
      for (int64_t j = 0; j < width; j++) to[2 * j] = one[j];
      for (int64_t j = 0; j < width; j++) to[2 * j + 1] = other ? other[j] : 0;
    }
  }

  const uint16_t* data;
  int64_t tokens, columns, count, chunks;
  std::vector<uint16_t> packed;
};

// Adds left^T right, made in float32, to sum, tile by tile; where both are one, only the tiles on and above the diagonal.
void add_moments(Panels& left, Panels* other, double* sum, AddTile add) {
  const Panels& right = other ? *other : left;
  const int64_t columns = right.columns;
  Crew::run([&](Crew::Member& member) {
    member.each(left.chunks * left.count, [&](int64_t piece) { left.pack(piece); });
    if (other) member.each(other->chunks * other->count, [&](int64_t piece) { other->pack(piece); });
    member.each(left.count * right.count, [&](int64_t piece) {
      const int64_t i = piece / right.count, j = piece % right.count;
      if (!other && j < i) return;
      const int64_t rows = std::min(PANEL, left.columns - i * PANEL), wide = std::min(PANEL, columns - j * PANEL);
      float tile[PANEL * PANEL] = {};
      for (int64_t c = 0; c < left.chunks; c++) add(left.at(c, i), right.at(c, j), left.pairs(c), tile);
      double* to = sum + i * PANEL * columns + j * PANEL;
      for (int64_t a = 0; a < rows; a++)
        for (int64_t b = 0; b < wide; b++) to[a * columns + b] += tile[a * PANEL + b];
    });
  });
}

void moments(Tensor left, std::optional<Tensor> right, Tensor sum, bool portable) {
  STD_TORCH_CHECK(left.dim() == 2, "left: expected two dimensions");
  STD_TORCH_CHECK(!right || right->dim() == 2, "right: expected two dimensions");
  const int64_t tokens = left.size(0), columns = right ? right->size(1) : left.size(1);
  if (right) check_shape(*right, {tokens, columns}, "right");
  check_shape(sum, {left.size(1), columns}, "sum");
  data_of<double>(sum, ScalarType::Double, "sum");
  Panels panels(data_of<uint16_t>(left, ScalarType::BFloat16, "left"), tokens, left.size(1));
  std::optional<Panels> others;
  if (right) others.emplace(data_of<uint16_t>(*right, ScalarType::BFloat16, "right"), tokens, columns);
  add_moments(panels, others ? &*others : nullptr, static_cast<double*>(sum.mutable_data_ptr()),
              portable ? add_tile_portable : widest());
}

}  // namespace
}  // namespace duotone

STABLE_TORCH_LIBRARY_FRAGMENT(duotone, m) {
  m.def("moments(Tensor left, Tensor? right, Tensor(a!) sum, bool portable) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) { m.impl("moments", TORCH_BOX(&duotone::moments)); }
