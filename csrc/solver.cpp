// The solver's ops through torch's stable ABI: one binary for every Python and every torch from 2.10 on.
// What they compute is said in src/duotone/solver/sweep.py and rows.py, whose torch versions they must agree with.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "local_search.h"
#include "solver_kernels.h"
#include "tensors.h"

namespace {

using duotone::check_shape;
using duotone::data_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const float* floats(const Tensor& tensor, const char* name) { return data_of<float>(tensor, ScalarType::Float, name); }

bool outer_per_row(const Tensor& outer_scale, int64_t rows) {
  STD_TORCH_CHECK(outer_scale.dim() == 1, "outer_scale: expected shape [N] or [1]");
  STD_TORCH_CHECK(outer_scale.size(0) == rows || outer_scale.size(0) == 1, "outer_scale: expected shape [N] or [1]");
  return outer_scale.size(0) == rows;
}

// A grid's tensors: group scales and zero points [G, N], the group of each column.
void check_grid(const Tensor& group_scale, const std::optional<Tensor>& zero_point, const Tensor& group, int64_t rows,
                int64_t columns) {
  STD_TORCH_CHECK(group_scale.dim() == 2, "group_scale: expected two dimensions");
  const int64_t groups = group_scale.size(0);
  check_shape(group_scale, {groups, rows}, "group_scale");
  check_shape(group, {columns}, "group");
  if (zero_point) check_shape(*zero_point, {groups, rows}, "zero_point");
  const int32_t* of = data_of<int32_t>(group, ScalarType::Int, "group");
  for (int64_t j = 0; j < columns; j++) STD_TORCH_CHECK(of[j] >= 0 && of[j] < groups, "group: found no such group");
}

std::tuple<Tensor, Tensor> sweep(Tensor base, Tensor reference, Tensor coupling, Tensor group_scale,
                                 std::optional<Tensor> zero_point, Tensor outer_scale, Tensor group, double lowest_level,
                                 double fp8_max, int64_t rule) {
  STD_TORCH_CHECK(base.dim() == 2, "base: expected two dimensions");
  STD_TORCH_CHECK(rule >= 0 && rule <= 3, "rule: expected 0, 1, 2 or 3");
  const int64_t columns = base.size(0), rows = base.size(1);
  check_shape(reference, {columns, rows}, "reference");
  check_shape(coupling, {columns, columns}, "coupling");
  check_grid(group_scale, zero_point, group, rows, columns);
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

// What both row ops are given of a grid; `codes` and `values` are written in place.
void set_rows(duotone::Rows& s, int64_t rows, int64_t columns, const Tensor& group_scale, const std::optional<Tensor>& zero_point,
              const Tensor& outer_scale, const Tensor& group, double lowest_level, double fp8_max) {
  check_grid(group_scale, zero_point, group, rows, columns);
  s.rows = rows, s.columns = columns;
  s.group_scale = floats(group_scale, "group_scale");
  s.zero_point = zero_point ? floats(*zero_point, "zero_point") : nullptr;
  s.group = data_of<int32_t>(group, ScalarType::Int, "group");
  s.outer_scale = floats(outer_scale, "outer_scale"), s.outer_per_row = outer_per_row(outer_scale, rows);
  s.lowest = static_cast<float>(lowest_level), s.fp8_max = static_cast<float>(fp8_max);
}

std::tuple<Tensor, Tensor> beam_rows(Tensor target, Tensor coupling, Tensor unit, Tensor diagonal, Tensor group_scale,
                                     std::optional<Tensor> zero_point, Tensor outer_scale, Tensor group,
                                     std::optional<Tensor> codes, std::optional<Tensor> values, double lowest_level,
                                     double fp8_max, int64_t width) {
  STD_TORCH_CHECK(target.dim() == 2, "target: expected two dimensions");
  STD_TORCH_CHECK(width > 0 && width <= 65536, "width: expected 1 to 65536");
  STD_TORCH_CHECK(codes.has_value() == values.has_value(), "codes, values: expected both or neither");
  const int64_t rows = target.size(0), columns = target.size(1);
  check_shape(coupling, {rows, rows}, "coupling");
  check_shape(unit, {columns, columns}, "unit");
  check_shape(diagonal, {columns}, "diagonal");
  duotone::Beam s{};
  set_rows(s, rows, columns, group_scale, zero_point, outer_scale, group, lowest_level, fp8_max);
  Tensor new_codes = torch::stable::new_empty(target, {rows, columns}, ScalarType::Byte);
  Tensor new_values = torch::stable::new_empty(target, {rows, columns});
  s.codes = static_cast<uint8_t*>(new_codes.mutable_data_ptr());
  s.values = static_cast<float*>(new_values.mutable_data_ptr());
  if (codes) {
    check_shape(*codes, {rows, columns}, "codes");
    check_shape(*values, {rows, columns}, "values");
    std::memcpy(s.codes, data_of<uint8_t>(*codes, ScalarType::Byte, "codes"), rows * columns);
    std::memcpy(s.values, floats(*values, "values"), sizeof(float) * rows * columns);
  }
  s.width = width, s.revisit = codes.has_value();
  s.target = floats(target, "target"), s.coupling = floats(coupling, "coupling"), s.diagonal = floats(diagonal, "diagonal");
  s.padded = (columns + duotone::SPAN - 1) / duotone::SPAN * duotone::SPAN;
  const float* weights = floats(unit, "unit");
  std::vector<float> padded(static_cast<size_t>(columns * s.padded));
  for (int64_t k = 0; k < columns; k++)
    for (int64_t j = k + 1; j < columns; j++) {
      const int64_t span = j / duotone::SPAN, at = j % duotone::SPAN;
      padded[(span * columns + k) * duotone::SPAN + at] = weights[k * columns + j];
    }
  s.unit = padded.data();
  duotone::beam_rows(s);
  return {new_codes, new_values};
}

std::tuple<Tensor, Tensor, Tensor> descend_rows(Tensor pull, Tensor curvature, Tensor hessian, Tensor group_scale,
                                                std::optional<Tensor> zero_point, Tensor outer_scale, Tensor group, Tensor codes,
                                                Tensor values, double lowest_level, double fp8_max) {
  STD_TORCH_CHECK(pull.dim() == 2, "pull: expected two dimensions");
  const int64_t columns = pull.size(0), rows = pull.size(1);
  check_shape(curvature, {rows, rows}, "curvature");
  check_shape(hessian, {columns, columns}, "hessian");
  check_shape(codes, {columns, rows}, "codes");
  check_shape(values, {columns, rows}, "values");
  duotone::Descent s{};
  set_rows(s, rows, columns, group_scale, zero_point, outer_scale, group, lowest_level, fp8_max);
  Tensor new_codes = torch::stable::clone(codes), new_values = torch::stable::clone(values);
  Tensor change = torch::stable::new_empty(pull, {columns, rows});
  data_of<uint8_t>(new_codes, ScalarType::Byte, "codes"), floats(new_values, "values");
  s.codes = static_cast<uint8_t*>(new_codes.mutable_data_ptr());
  s.values = static_cast<float*>(new_values.mutable_data_ptr());
  s.change = static_cast<float*>(change.mutable_data_ptr());
  s.pull = floats(pull, "pull"), s.curvature = floats(curvature, "curvature"), s.hessian = floats(hessian, "hessian");
  duotone::descend_rows(s);
  return {new_codes, new_values, change};
}

// Runs `search` on a Hessian whose rows are filled with zeros to whole SCANs.
template <typename Weight>
void search_padded(duotone::LocalSearch<Weight>& s, const Weight* hessian,
                   void (*search)(const duotone::LocalSearch<Weight>&, int64_t, int64_t)) {
  const int64_t columns = s.columns;
  s.padded = (columns + duotone::SCAN - 1) / duotone::SCAN * duotone::SCAN;
  s.hessian = hessian;
  std::vector<Weight> padded;
  if (s.padded != columns) {
    padded.resize(static_cast<size_t>(columns * s.padded));
    for (int64_t k = 0; k < columns; k++) std::memcpy(padded.data() + k * s.padded, hessian + k * columns, sizeof(Weight) * columns);
    s.hessian = padded.data();
  }
  torch::stable::parallel_for(0, s.rows, 1, [&](int64_t first, int64_t last) { search(s, first, last); });
}

// hessian: float, or BF16.
Tensor local_search(Tensor gradient, Tensor hessian, Tensor damping, Tensor group_scale, std::optional<Tensor> zero_point,
                    Tensor outer_scale, Tensor group, Tensor codes, double lowest_level, double fp8_max, int64_t steps,
                    int64_t tenure) {
  STD_TORCH_CHECK(gradient.dim() == 2, "gradient: expected two dimensions");
  STD_TORCH_CHECK(steps >= 0 && tenure >= 1, "steps, tenure: expected at least 0 and 1");
  const int64_t rows = gradient.size(0), columns = gradient.size(1);
  check_shape(hessian, {columns, columns}, "hessian");
  check_shape(damping, {columns}, "damping");
  check_shape(codes, {rows, columns}, "codes");
  Tensor improved = torch::stable::clone(codes);
  data_of<uint8_t>(improved, ScalarType::Byte, "codes");
  const auto filled = [&](auto s) {
    set_rows(s, rows, columns, group_scale, zero_point, outer_scale, group, lowest_level, fp8_max);
    s.codes = static_cast<uint8_t*>(improved.mutable_data_ptr());
    s.gradient = floats(gradient, "gradient"), s.damping = floats(damping, "damping");
    s.steps = steps, s.tenure = tenure;
    return s;
  };
  if (hessian.scalar_type() == ScalarType::BFloat16) {
    auto s = filled(duotone::LocalSearch<uint16_t>{});
    search_padded(s, data_of<uint16_t>(hessian, ScalarType::BFloat16, "hessian"), duotone::search_rows_bf16);
  } else {
    auto s = filled(duotone::LocalSearch<float>{});
    search_padded(s, floats(hessian, "hessian"), duotone::search_rows);
  }
  return improved;
}

}  // namespace

STABLE_TORCH_LIBRARY(duotone, m) {
  m.def(
      "sweep(Tensor base, Tensor reference, Tensor coupling, Tensor group_scale, Tensor? zero_point, Tensor outer_scale, "
      "Tensor group, float lowest_level, float fp8_max, int rule) -> (Tensor codes, Tensor values)");
  m.def(
      "scale_error(Tensor weight, Tensor candidates, Tensor? zero_point, Tensor outer_scale, Tensor? column_weight, "
      "float lowest_level, float fp8_max, int group_size) -> Tensor");
  m.def(
      "beam_rows(Tensor target, Tensor coupling, Tensor unit, Tensor diagonal, Tensor group_scale, Tensor? zero_point, "
      "Tensor outer_scale, Tensor group, Tensor? codes, Tensor? values, float lowest_level, float fp8_max, int width) "
      "-> (Tensor codes, Tensor values)");
  m.def(
      "descend_rows(Tensor pull, Tensor curvature, Tensor hessian, Tensor group_scale, Tensor? zero_point, "
      "Tensor outer_scale, Tensor group, Tensor codes, Tensor values, float lowest_level, float fp8_max) "
      "-> (Tensor codes, Tensor values, Tensor change)");
  m.def(
      "local_search(Tensor gradient, Tensor hessian, Tensor damping, Tensor group_scale, Tensor? zero_point, "
      "Tensor outer_scale, Tensor group, Tensor codes, float lowest_level, float fp8_max, int steps, int tenure) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) {
  m.impl("sweep", TORCH_BOX(&sweep));
  m.impl("scale_error", TORCH_BOX(&scale_error));
  m.impl("beam_rows", TORCH_BOX(&beam_rows));
  m.impl("descend_rows", TORCH_BOX(&descend_rows));
  m.impl("local_search", TORCH_BOX(&local_search));
}
