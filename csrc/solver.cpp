// The solver's two ops through torch's stable ABI: one binary for every Python and every torch from 2.10 on.
// What they compute is said in src/duotone/solver/sweep.py, whose torch versions they must agree with.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "solver_kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reading through a pointer trusts these; the Python side has already put tensors into this form.
template <typename T>
const T* data_of(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, ": expected a contiguous CPU tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": found another type than expected");
  return static_cast<const T*>(tensor.const_data_ptr());
}

const float* floats(const Tensor& tensor, const char* name) { return data_of<float>(tensor, ScalarType::Float, name); }

void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && tensor.size(i++) == size;
  STD_TORCH_CHECK(same, name, ": found another shape than expected");
}

bool outer_per_row(const Tensor& outer_scale, int64_t rows) {
  STD_TORCH_CHECK(outer_scale.dim() == 1, "outer_scale: expected shape [N] or [1]");
  STD_TORCH_CHECK(outer_scale.size(0) == rows || outer_scale.size(0) == 1, "outer_scale: expected shape [N] or [1]");
  return outer_scale.size(0) == rows;
}

std::tuple<Tensor, Tensor> sweep(Tensor base, Tensor reference, Tensor coupling, Tensor group_scale,
                                 std::optional<Tensor> zero_point, Tensor outer_scale, Tensor group, double lowest_level,
                                 double fp8_max, int64_t rule) {
  STD_TORCH_CHECK(base.dim() == 2 && group_scale.dim() == 2, "base, group_scale: expected two dimensions");
  STD_TORCH_CHECK(rule >= 0 && rule <= 2, "rule: expected 0, 1 or 2");
  const int64_t columns = base.size(0), rows = base.size(1), groups = group_scale.size(0);
  check_shape(reference, {columns, rows}, "reference");
  check_shape(coupling, {columns, columns}, "coupling");
  check_shape(group_scale, {groups, rows}, "group_scale");
  check_shape(group, {columns}, "group");
  if (zero_point) check_shape(*zero_point, {groups, rows}, "zero_point");
  Tensor codes = torch::stable::new_empty(base, {columns, rows}, ScalarType::Byte);
  Tensor values = torch::stable::new_empty(base, {columns, rows});
  // By columns, so that a column's weights are read one after the other.
  const float* weights = floats(coupling, "coupling");
  std::vector<float> transposed(static_cast<size_t>(columns * columns));
  for (int64_t j = 0; j < columns; j++)
    for (int64_t i = 0; i < j; i++) transposed[j * columns + i] = weights[i * columns + j];
  duotone::Sweep s{};
  s.rows = rows, s.columns = columns, s.rule = rule;
  s.base = floats(base, "base"), s.reference = floats(reference, "reference");
  s.coupling = transposed.data();
  s.group_scale = floats(group_scale, "group_scale");
  s.zero_point = zero_point ? floats(*zero_point, "zero_point") : nullptr;
  s.group = data_of<int32_t>(group, ScalarType::Int, "group");
  for (int64_t j = 0; j < columns; j++) STD_TORCH_CHECK(s.group[j] >= 0 && s.group[j] < groups, "group: found no such group");
  s.outer_scale = floats(outer_scale, "outer_scale"), s.outer_per_row = outer_per_row(outer_scale, rows);
  s.lowest = static_cast<float>(lowest_level), s.fp8_max = static_cast<float>(fp8_max);
  s.codes = static_cast<uint8_t*>(codes.mutable_data_ptr()), s.values = static_cast<float*>(values.mutable_data_ptr());
  const int64_t tiles = (rows + duotone::LANES - 1) / duotone::LANES;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) { duotone::sweep_tiles(s, first, last); });
  return {codes, values};
}

Tensor scale_error(Tensor weight, Tensor candidates, std::optional<Tensor> zero_point, Tensor outer_scale,
                   std::optional<Tensor> column_weight, double lowest_level, double fp8_max, int64_t group_size) {
  STD_TORCH_CHECK(weight.dim() == 2 && candidates.dim() == 3, "weight, candidates: expected two and three dimensions");
  STD_TORCH_CHECK(group_size > 0, "group_size: expected at least 1");
  const int64_t rows = weight.size(0), columns = weight.size(1), groups = (columns + group_size - 1) / group_size;
  check_shape(candidates, {rows, groups, candidates.size(2)}, "candidates");
  if (zero_point) check_shape(*zero_point, {rows, groups}, "zero_point");
  if (column_weight) check_shape(*column_weight, {columns}, "column_weight");
  Tensor error = torch::stable::new_empty(weight, {rows, groups, candidates.size(2)});
  duotone::ScaleError s{};
  s.rows = rows, s.columns = columns, s.groups = groups, s.candidates = candidates.size(2), s.group_size = group_size;
  s.weight = floats(weight, "weight"), s.candidate = floats(candidates, "candidates");
  s.zero_point = zero_point ? floats(*zero_point, "zero_point") : nullptr;
  s.outer_scale = floats(outer_scale, "outer_scale"), s.outer_per_row = outer_per_row(outer_scale, rows);
  s.column_weight = column_weight ? floats(*column_weight, "column_weight") : nullptr;
  s.lowest = static_cast<float>(lowest_level), s.fp8_max = static_cast<float>(fp8_max);
  s.error = static_cast<float*>(error.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 8, [&](int64_t first, int64_t last) { duotone::scale_error_rows(s, first, last); });
  return error;
}

}  // namespace

STABLE_TORCH_LIBRARY(duotone, m) {
  m.def(
      "sweep(Tensor base, Tensor reference, Tensor coupling, Tensor group_scale, Tensor? zero_point, Tensor outer_scale, "
      "Tensor group, float lowest_level, float fp8_max, int rule) -> (Tensor codes, Tensor values)");
  m.def(
      "scale_error(Tensor weight, Tensor candidates, Tensor? zero_point, Tensor outer_scale, Tensor? column_weight, "
      "float lowest_level, float fp8_max, int group_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) {
  m.impl("sweep", TORCH_BOX(&sweep));
  m.impl("scale_error", TORCH_BOX(&scale_error));
}
