// The W4A8 linear as an op: activations to FP8, the product, scales, bias. src/duotone/kernels/cpu.py says what it computes,
// src/duotone/kernels/reference.py is the specification.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "linear_kernels.h"
#include "solver_kernels.h"
#include "tensors.h"

namespace duotone {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// kernels/cpu.py has their names.
enum Path : int64_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

LinearPath path_of(int64_t path) { return path == AVX512 ? linear_avx512 : path == AVX2 ? linear_avx2 : linear_portable; }

bool supported(int64_t path) {
  if (path == PORTABLE) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (path == AVX2) return linear_avx2 && avx2;
  if (path == AVX512)
    return linear_avx512 && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

// The paths this machine can run, as a sum of 1 << path.
int64_t linear_paths() {
  int64_t found = 0;
  for (int64_t path : {PORTABLE, AVX2, AVX512}) found |= supported(path) ? int64_t{1} << path : 0;
  return found;
}

// Bytes of 32 columns in the order that linear_paths.h decodes, for any number of rows and columns.
Tensor pack_codes(Tensor codes) {
  STD_TORCH_CHECK(codes.dim() == 2, "codes: expected two dimensions");
  const uint8_t* from = data_of<uint8_t>(codes, ScalarType::Byte, "codes");
  const int64_t rows = codes.size(0), columns = codes.size(1);
  const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, chunks = (columns + CHUNK - 1) / CHUNK;
  Tensor packed = torch::stable::new_empty(codes, {blocks, chunks, BLOCK_ROWS, CHUNK_BYTES});
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      for (int64_t r = 0; r < BLOCK_ROWS; r++) {
        const int64_t row = block * BLOCK_ROWS + r;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          uint8_t code[CHUNK] = {};
          if (row < rows) std::memcpy(code, from + row * columns + chunk * CHUNK, std::min(CHUNK, columns - chunk * CHUNK));
          uint8_t* bytes = to + ((block * chunks + chunk) * BLOCK_ROWS + r) * CHUNK_BYTES;
          for (int i = 0; i < CHUNK_BYTES; i++) {
            const int column = i / 8 * 8 + i % 2 * 4 + i % 8 / 2;
            bytes[i] = static_cast<uint8_t>(code[column] | code[column + CHUNK / 2] << 4);
          }
        }
      }
  });
  return packed;
}

DUOTONE_INLINE float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
DUOTONE_INLINE float widen(float x) { return x; }

DUOTONE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Half to even; a NaN stays one.
DUOTONE_INLINE void narrow(float x, uint16_t& to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  to = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
DUOTONE_INLINE void narrow(float x, float& to) { to = x; }

// How activations become FP8: a static scale, or 0 for one a token, no smaller than `smallest`.
struct Rounding {
  float scale, fp8_max, smallest;
};

// One token's values on the FP8 grid, zeros up to `padded`; returns its scale.
template <typename T>
DUOTONE_INLINE float quantize_token(const T* x, int64_t columns, int64_t padded, const Rounding& how, float* to) {
  float scale = how.scale;
  if (scale == 0.0f) {
    uint32_t largest = 0;  // without their sign, floats rise with their bits, NaN above all
    for (int64_t k = 0; k < columns; k++) largest = std::max(largest, bits_of(widen(x[k])) & 0x7FFFFFFFu);
    std::memcpy(&scale, &largest, 4);
    scale /= how.fp8_max;
    scale = scale < how.smallest ? how.smallest : scale;
  }
  for (int64_t k = 0; k < columns; k++) to[k] = fp8_round(clamp(widen(x[k]) / scale, -how.fp8_max, how.fp8_max));
  for (int64_t k = columns; k < padded; k++) to[k] = 0.0f;
  return scale;
}

DUOTONE_CLONES float quantize(const uint16_t* x, int64_t columns, int64_t padded, const Rounding& how, float* to) {
  return quantize_token(x, columns, padded, how, to);
}
DUOTONE_CLONES float quantize(const float* x, int64_t columns, int64_t padded, const Rounding& how, float* to) {
  return quantize_token(x, columns, padded, how, to);
}

template <typename T>
DUOTONE_INLINE void finish_token(const float* total, const float* outer, float scale, const T* bias, int64_t rows, T* y) {
  for (int64_t n = 0; n < rows; n++) {
    narrow(total[n] * outer[n] * scale, y[n]);
    if (bias) narrow(widen(y[n]) + widen(bias[n]), y[n]);
  }
}

DUOTONE_CLONES void finish(const float* total, const float* outer, float scale, const uint16_t* bias, int64_t rows,
                           uint16_t* y) {
  finish_token(total, outer, scale, bias, rows, y);
}
DUOTONE_CLONES void finish(const float* total, const float* outer, float scale, const float* bias, int64_t rows, float* y) {
  finish_token(total, outer, scale, bias, rows, y);
}

struct Freed {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Freed>;

Floats floats_of(int64_t count) {
  return Floats(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(count * 4 + 63) / 64 * 64)));
}

// Work of about 64 thousand multiplications a thread is worth a thread.
int64_t grain(int64_t each) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, each)); }

// Rows of a wide index are looked at in every call, one byte in 32 of what it reads anyway. A byte cannot leave 256 rows.
const uint16_t* wide_rows(const Tensor& index, int64_t rows) {
  const uint16_t* row = data_of<uint16_t>(index, ScalarType::UInt16, "index");
  uint16_t largest = 0;
  for (int64_t i = 0; i < index.numel(); i++) largest = std::max(largest, row[i]);
  STD_TORCH_CHECK(largest < rows, "index: found no such row of the table");
  return row;
}

// The weight's side of the product, checked.
Linear weight_of(const Tensor& codes, const Tensor& index, const Tensor& table, int64_t rows, int64_t columns,
                 int64_t group_size) {
  STD_TORCH_CHECK(group_size > 0 && group_size % CHUNK == 0, "group_size: expected a multiple of 32");
  Linear p{};
  p.rows = rows, p.chunks = (columns + CHUNK - 1) / CHUNK;
  p.group_chunks = group_size / CHUNK, p.groups = (p.chunks + p.group_chunks - 1) / p.group_chunks;
  check_shape(codes, {p.blocks(), p.chunks, BLOCK_ROWS, CHUNK_BYTES}, "codes");
  check_shape(index, {p.blocks(), p.groups, BLOCK_ROWS}, "index");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) >= 256, "table: expected shape [256 or more, 32]");
  check_shape(table, {table.size(0), TABLE_BYTES}, "table");
  p.wide_index = table.size(0) > 256;
  p.codes = data_of<uint8_t>(codes, ScalarType::Byte, "codes");
  if (p.wide_index) p.index = wide_rows(index, table.size(0));
  else p.index = data_of<uint8_t>(index, ScalarType::Byte, "index");
  p.table = data_of<uint8_t>(table, ScalarType::Byte, "table");
  return p;
}

template <typename T>
void multiply(Linear p, const T* x, int64_t columns, const Rounding& how, const float* outer, const T* bias, LinearPath run,
              T* y) {
  const int64_t padded = p.chunks * CHUNK, stride = p.blocks() * BLOCK_ROWS;
  const Floats grid = floats_of(p.tokens * padded), total = floats_of(p.tokens * stride), scale = floats_of(p.tokens);
  p.x = grid.get(), p.total = total.get();
  torch::stable::parallel_for(0, p.tokens, grain(padded * 4), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) scale[m] = quantize(x + m * columns, columns, padded, how, grid.get() + m * padded);
  });
  torch::stable::parallel_for(0, p.blocks(), grain(padded * BLOCK_ROWS * p.tokens),
                              [&](int64_t begin, int64_t end) { run(p, begin, end); });
  torch::stable::parallel_for(0, p.tokens, grain(p.rows * 4), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) finish(total.get() + m * stride, outer, scale[m], bias, p.rows, y + m * p.rows);
  });
}

Tensor linear(Tensor x, Tensor codes, Tensor index, Tensor table, Tensor outer_scale, std::optional<Tensor> input_scale,
              std::optional<Tensor> bias, int64_t columns, int64_t group_size, double fp8_max, double smallest_scale,
              int64_t path) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == columns, "x: expected shape [M, K]");
  STD_TORCH_CHECK(supported(path), "path: this machine cannot run it");
  STD_TORCH_CHECK(outer_scale.dim() == 1, "outer_scale: expected shape [N]");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float, "x: expected bfloat16 or float32");
  Linear p = weight_of(codes, index, table, outer_scale.size(0), columns, group_size);
  p.tokens = x.size(0);
  const float* outer = data_of<float>(outer_scale, ScalarType::Float, "outer_scale");
  Rounding how{0.0f, static_cast<float>(fp8_max), static_cast<float>(smallest_scale)};
  if (input_scale) {
    STD_TORCH_CHECK(input_scale->numel() == 1, "input_scale: expected one value");
    how.scale = *data_of<float>(*input_scale, ScalarType::Float, "input_scale");
    STD_TORCH_CHECK(how.scale > 0.0f, "input_scale: expected a positive value");
  }
  if (bias) check_shape(*bias, {p.rows}, "bias");
  Tensor y = torch::stable::new_empty(x, {p.tokens, p.rows});
  if (!p.tokens || !p.rows) return y;
  const auto call = [&]<typename T>(T*) {
    multiply(p, data_of<T>(x, type, "x"), columns, how, outer, bias ? data_of<T>(*bias, type, "bias") : nullptr, path_of(path),
             static_cast<T*>(y.mutable_data_ptr()));
  };
  if (type == ScalarType::BFloat16) call(static_cast<uint16_t*>(nullptr));
  else call(static_cast<float*>(nullptr));
  return y;
}

}  // namespace
}  // namespace duotone

STABLE_TORCH_LIBRARY_FRAGMENT(duotone, m) {
  m.def("linear_paths() -> int");
  m.def("pack_codes(Tensor codes) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor codes, Tensor index, Tensor table, Tensor outer_scale, Tensor? input_scale, Tensor? bias, "
      "int columns, int group_size, float fp8_max, float smallest_scale, int path) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&duotone::pack_codes));
  m.impl("linear", TORCH_BOX(&duotone::linear));
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CompositeExplicitAutograd, m) { m.impl("linear_paths", TORCH_BOX(&duotone::linear_paths)); }
