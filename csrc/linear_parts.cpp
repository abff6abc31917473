#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include "linear_parts.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>

#include "floats.h"
#include "solver_kernels.h"
#include "tensors.h"

namespace duotone {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// kernels/cpu.py has their names.
enum Path : int64_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512VNNI = 3, AVX512VBMI = 4 };

const LinearPath& path_of(int64_t path) {
  switch (path) {
    case AVX2: return linear_avx2;
    case AVX512: return linear_avx512;
    case AVX512VNNI: return linear_avx512vnni;
    case AVX512VBMI: return linear_avx512vbmi;
    default: return linear_portable;
  }
}

bool supported(int64_t path) {
  if (path == PORTABLE) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (path == AVX2) return linear_avx2.run && avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (path == AVX512) return linear_avx512.run && avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (path == AVX512VNNI) return linear_avx512vnni.run && vnni;
  if (path == AVX512VBMI) return linear_avx512vbmi.run && vnni && __builtin_cpu_supports("avx512vbmi");
#endif
  return false;
}

template <typename T>
DUOTONE_INLINE void finish_rows(const float* total, const float* outer, float scale, const T* bias, int64_t rows, T* y) {
  for (int64_t n = 0; n < rows; n++) {
    narrow(total[n] * outer[n] * scale, y[n]);
    if (bias) narrow(widen(y[n]) + widen(bias[n]), y[n]);
  }
}

DUOTONE_CLONES void outputs(const float* total, const float* outer, float scale, const uint16_t* bias, int64_t rows,
                            uint16_t* y) {
  finish_rows(total, outer, scale, bias, rows, y);
}
DUOTONE_CLONES void outputs(const float* total, const float* outer, float scale, const float* bias, int64_t rows, float* y) {
  finish_rows(total, outer, scale, bias, rows, y);
}

// Rows of a wide index are looked at in every call, one byte in 32 of what it reads anyway. A byte cannot leave 256 rows.
const uint16_t* wide_rows(const Tensor& index, int64_t rows) {
  const uint16_t* row = data_of<uint16_t>(index, ScalarType::UInt16, "index");
  uint16_t largest = 0;
  for (int64_t i = 0; i < index.numel(); i++) largest = std::max(largest, row[i]);
  STD_TORCH_CHECK(largest < rows, "index: found no such row of the table");
  return row;
}

// Whether the rows of a table have the units that linear_kernels.h gives to FP8 bytes.
bool has_byte_units(const Linear& p) {
  bool all = !p.wide_index;
  for (int r = 0; r < 127; r++) all = all && p.table[r].unit == std::ldexp(1.0f, r / 8 + BYTE_UNIT - 127);
  return all;
}

// Tensors as linear_kernels.h has them.
void take_blocks(Linear& p, const Tensor& codes, const Tensor& index, const Tensor& table) {
  check_shape(codes, {p.blocks(), p.chunks, BLOCK_ROWS / 2, 2, CHUNK_BYTES}, "codes");
  check_shape(index, {p.blocks(), p.groups, BLOCK_ROWS}, "index");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) >= 256, "table: expected shape [256 or more, 32]");
  check_shape(table, {table.size(0), TABLE_BYTES}, "table");
  p.wide_index = table.size(0) > 256;
  if (p.wide_index) p.index = wide_rows(index, table.size(0));
  else p.index = data_of<uint8_t>(index, ScalarType::Byte, "index");
  p.table = reinterpret_cast<const Sixteen*>(data_of<uint8_t>(table, ScalarType::Byte, "table"));
  p.byte_units = has_byte_units(p);
}

// As linear_avx512vbmi.cpp has them.
void take_columns(Linear& p, const Tensor& codes, const Tensor& index, const Tensor& table) {
  const int64_t blocks = (p.rows + COLUMN_ROWS - 1) / COLUMN_ROWS;
  check_shape(codes, {blocks, p.columns() / COLUMN_STEP, COLUMN_ROWS, COLUMN_STEP / 2}, "codes");
  check_shape(index, {blocks, p.groups, COLUMN_ROWS}, "index");
  check_shape(table, {8, 16}, "table");
  STD_TORCH_CHECK(p.bias >= 0, "value_bias: expected one for all");
  p.index = data_of<uint8_t>(index, ScalarType::Byte, "index");
  p.by_mantissa = data_of<uint8_t>(table, ScalarType::Byte, "table");
}

}  // namespace

int64_t linear_paths() {
  int64_t found = 0;
  for (int64_t path : {PORTABLE, AVX2, AVX512, AVX512VNNI, AVX512VBMI}) found |= supported(path) ? int64_t{1} << path : 0;
  return found;
}

Weight weight_of(const Tensor* four, const Tensor* input_scale, const WeightFacts& facts) {
  const Tensor &codes = four[0], &index = four[1], &table = four[2], &outer_scale = four[3];
  STD_TORCH_CHECK(supported(facts.path), "path: this machine cannot run it");
  STD_TORCH_CHECK(facts.group_size > 0 && facts.group_size % CHUNK == 0, "group_size: expected a multiple of 32");
  STD_TORCH_CHECK(facts.columns > 0, "columns: expected some");
  STD_TORCH_CHECK(facts.value_bias >= -1 && facts.value_bias <= 255, "value_bias: expected a byte, or -1");
  STD_TORCH_CHECK(facts.fp8_max > 0 && facts.fp8_max <= 448, "fp8_max: expected at most 448");
  STD_TORCH_CHECK(outer_scale.dim() == 1, "outer_scale: expected shape [N]");
  Weight weight{};
  weight.path = &path_of(facts.path);
  Linear& p = weight.p;
  p.in_features = facts.columns, p.fp8_max = static_cast<float>(facts.fp8_max);
  p.smallest_scale = static_cast<float>(facts.smallest_scale);
  p.rows = outer_scale.size(0), p.chunks = (facts.columns + CHUNK - 1) / CHUNK, p.bias = static_cast<int32_t>(facts.value_bias);
  const int64_t group_chunks = facts.group_size / CHUNK;
  p.groups = (p.chunks + group_chunks - 1) / group_chunks;
  p.segment_chunks = std::min(group_chunks, SEGMENT_CHUNKS);
  while (group_chunks % p.segment_chunks) p.segment_chunks--;
  p.segments = (p.chunks + p.segment_chunks - 1) / p.segment_chunks, p.group_segments = group_chunks / p.segment_chunks;
  p.codes = data_of<uint8_t>(codes, ScalarType::Byte, "codes");
  if (facts.path == AVX512VBMI) take_columns(p, codes, index, table);
  else take_blocks(p, codes, index, table);
  weight.outer = data_of<float>(outer_scale, ScalarType::Float, "outer_scale");
  if (input_scale) {
    STD_TORCH_CHECK(input_scale->numel() == 1, "input_scale: expected one value");
    p.input_scale = *data_of<float>(*input_scale, ScalarType::Float, "input_scale");
    STD_TORCH_CHECK(p.input_scale > 0.0f, "input_scale: expected a positive value");
  }
  return weight;
}

uint8_t* Scratch::at_least(int64_t bytes) {
  if (bytes > bytes_) {
    memory_ = nullptr, bytes_ = 0;
    memory_ = array_of<uint8_t>(bytes);
    use_large_pages(memory_.get(), bytes);
    bytes_ = bytes;
  }
  return memory_.get();
}

void use_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

namespace {

// Hands out parts of a piece of memory one after the other, each beginning with a line of cache; without memory it only counts.
struct Parts {
  uint8_t* memory;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(memory + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
};

float* lay_out(Linear& p, Parts& parts) {
  p.high = parts.take<int16_t>(p.tokens * p.columns()), p.low = parts.take<int16_t>(p.tokens * p.columns());
  p.segment = parts.take<Segment>(p.tokens * p.segments);
  p.low_segments = parts.take<uint64_t>(p.tokens * p.low_words());
  p.total = parts.take<float>(p.tokens * p.stride());
  return parts.take<float>(p.tokens);
}

}  // namespace

int64_t Product::bytes(const Weight& weight, int64_t tokens) {
  Linear p = weight.p;
  p.tokens = tokens;
  Parts parts{nullptr};
  lay_out(p, parts);
  return parts.used;
}

Product::Product(const Weight& weight, int64_t tokens, uint8_t* memory) : weight_(weight), p_(weight.p) {
  p_.tokens = tokens;
  // Many pieces a thread, so that one who is interrupted leaves little; few, so that activations serve many rows.
  const int64_t pieces = 16 * static_cast<int64_t>(torch::stable::get_num_threads());
  step_ = std::max(grain(p_.columns() * BLOCK_ROWS * 2 * tokens), pairs() / pieces);
  if (!memory) own_ = array_of<uint8_t>(bytes(weight, tokens));
  Parts parts{memory ? memory : own_.get()};
  scale_ = lay_out(p_, parts);
}

void Product::quantize(const uint16_t* x, int64_t token) { scale_[token] = weight_.path->split_bf16(p_, x, token); }
void Product::quantize(const float* x, int64_t token) { scale_[token] = weight_.path->split_float(p_, x, token); }

void Product::multiply(int64_t piece) {
  weight_.path->run(p_, piece * step_ * 2, std::min((piece + 1) * step_ * 2, p_.blocks()));
}

void Product::finish(int64_t token, int64_t begin, int64_t end, const uint16_t* bias, uint16_t* y) const {
  outputs(p_.total + token * p_.stride() + begin, weight_.outer + begin, scale_[token], bias, end - begin, y);
}
void Product::finish(int64_t token, int64_t begin, int64_t end, const float* bias, float* y) const {
  outputs(p_.total + token * p_.stride() + begin, weight_.outer + begin, scale_[token], bias, end - begin, y);
}

}  // namespace duotone
