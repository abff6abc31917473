#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include "linear_parts.h"

#include <cmath>
#include <limits>

#include "floats.h"
#include "solver_kernels.h"
#include "tensors.h"

namespace duotone {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// kernels/cpu.py has their names.
enum Path : int64_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512VNNI = 3 };

LinearPath path_of(int64_t path) {
  switch (path) {
    case AVX2: return linear_avx2;
    case AVX512: return linear_avx512;
    case AVX512VNNI: return linear_avx512vnni;
    default: return linear_portable;
  }
}

bool supported(int64_t path) {
  if (path == PORTABLE) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (path == AVX2) return linear_avx2 && avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (path == AVX512) return linear_avx512 && avx512;
  if (path == AVX512VNNI) return linear_avx512vnni && avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

// A segment's whole numbers of 2^-9: as many bits as fit 16, and apart from them what is below.
DUOTONE_INLINE Segment split_segment(const int32_t* value, int64_t chunks, int16_t* high, int16_t* low) {
  int32_t largest = 0;
  for (int64_t k = 0; k < chunks * CHUNK; k++) largest = std::max(largest, std::abs(value[k]));
  int shift = 0;
  while (largest >> shift > INT16_MAX) shift++;
  Segment found{LOW_SCALE * static_cast<float>(1 << shift), 0, 0, 0};
  for (int64_t c = 0; c < chunks; c++) {
    int32_t any = 0;
    for (int64_t k = c * CHUNK; k < (c + 1) * CHUNK; k++) {
      const int32_t above = value[k] >> shift, below = value[k] - (above << shift);
      high[k] = static_cast<int16_t>(above), low[k] = static_cast<int16_t>(below);
      found.high_sum += above, found.low_sum += below;
      any |= below;
    }
    found.low_chunks |= any ? uint32_t{1} << c : 0;
  }
  return found;
}

// A token on the FP8 grid, in whole numbers of LOW_SCALE; returns its scale, NaN for a token that holds what is no number.
template <typename T>
DUOTONE_INLINE float whole_numbers(const T* x, const Weight& weight, int32_t* value) {
  const int64_t columns = weight.columns;
  uint32_t largest = 0;  // without their sign, floats rise with their bits, NaN above all
  for (int64_t k = 0; k < columns; k++) largest = std::max(largest, bits_of(widen(x[k])) & 0x7FFFFFFFu);
  constexpr uint32_t infinity = 0x7F800000u;
  float scale = weight.input_scale;
  const bool number = scale == 0.0f ? largest < infinity : largest <= infinity;  // a static scale clamps infinities
  if (scale == 0.0f) {
    std::memcpy(&scale, &largest, 4);
    scale /= weight.fp8_max;
    scale = scale < weight.smallest_scale ? weight.smallest_scale : scale;
  }
  if (!number) scale = std::numeric_limits<float>::quiet_NaN();
  for (int64_t k = 0; k < columns; k++) {
    const float fp8 = number ? fp8_round(clamp(widen(x[k]) / scale, -weight.fp8_max, weight.fp8_max)) : 0.0f;
    value[k] = static_cast<int32_t>(fp8 / LOW_SCALE);
  }
  for (int64_t k = columns; k < weight.p.columns(); k++) value[k] = 0;
  return scale;
}

template <typename T>
DUOTONE_INLINE float split_token(const T* x, const Weight& weight, const Linear& p, int64_t token, int32_t* value, int16_t* high,
                                 int16_t* low, Segment* segment) {
  const float scale = whole_numbers(x, weight, value);
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t at = p.at(s, token);
    Segment& of = segment[s * p.tokens + token];
    of = split_segment(value + s * p.segment_chunks * CHUNK, p.chunks_of(s), high + at, low + at);
    if (p.bias >= 0) of.high_sum *= p.bias, of.low_sum *= p.bias;
  }
  return scale;
}

DUOTONE_CLONES float split(const uint16_t* x, const Weight& weight, const Linear& p, int64_t token, int32_t* value,
                           int16_t* high, int16_t* low, Segment* segment) {
  return split_token(x, weight, p, token, value, high, low, segment);
}
DUOTONE_CLONES float split(const float* x, const Weight& weight, const Linear& p, int64_t token, int32_t* value, int16_t* high,
                           int16_t* low, Segment* segment) {
  return split_token(x, weight, p, token, value, high, low, segment);
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

}  // namespace

int64_t linear_paths() {
  int64_t found = 0;
  for (int64_t path : {PORTABLE, AVX2, AVX512, AVX512VNNI}) found |= supported(path) ? int64_t{1} << path : 0;
  return found;
}

Weight weight_of(const Tensor* four, const Tensor* input_scale, const WeightFacts& facts) {
  const Tensor &codes = four[0], &index = four[1], &table = four[2], &outer_scale = four[3];
  STD_TORCH_CHECK(supported(facts.path), "path: this machine cannot run it");
  STD_TORCH_CHECK(facts.group_size > 0 && facts.group_size % CHUNK == 0, "group_size: expected a multiple of 32");
  STD_TORCH_CHECK(facts.columns > 0, "columns: expected some");
  STD_TORCH_CHECK(outer_scale.dim() == 1, "outer_scale: expected shape [N]");
  Weight weight{};
  weight.columns = facts.columns, weight.run = path_of(facts.path);
  weight.fp8_max = static_cast<float>(facts.fp8_max), weight.smallest_scale = static_cast<float>(facts.smallest_scale);
  Linear& p = weight.p;
  p.rows = outer_scale.size(0), p.chunks = (facts.columns + CHUNK - 1) / CHUNK, p.bias = static_cast<int32_t>(facts.value_bias);
  const int64_t group_chunks = facts.group_size / CHUNK;
  p.groups = (p.chunks + group_chunks - 1) / group_chunks;
  p.segment_chunks = std::min(group_chunks, SEGMENT_CHUNKS);
  while (group_chunks % p.segment_chunks) p.segment_chunks--;
  p.segments = (p.chunks + p.segment_chunks - 1) / p.segment_chunks, p.group_segments = group_chunks / p.segment_chunks;
  check_shape(codes, {p.blocks(), p.chunks, BLOCK_ROWS / 2, 2, CHUNK_BYTES}, "codes");
  check_shape(index, {p.blocks(), p.groups, BLOCK_ROWS}, "index");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) >= 256, "table: expected shape [256 or more, 32]");
  check_shape(table, {table.size(0), TABLE_BYTES}, "table");
  p.wide_index = table.size(0) > 256;
  p.codes = data_of<uint8_t>(codes, ScalarType::Byte, "codes");
  if (p.wide_index) p.index = wide_rows(index, table.size(0));
  else p.index = data_of<uint8_t>(index, ScalarType::Byte, "index");
  p.table = reinterpret_cast<const Sixteen*>(data_of<uint8_t>(table, ScalarType::Byte, "table"));
  p.byte_units = has_byte_units(p);
  weight.outer = data_of<float>(outer_scale, ScalarType::Float, "outer_scale");
  if (input_scale) {
    STD_TORCH_CHECK(input_scale->numel() == 1, "input_scale: expected one value");
    weight.input_scale = *data_of<float>(*input_scale, ScalarType::Float, "input_scale");
    STD_TORCH_CHECK(weight.input_scale > 0.0f, "input_scale: expected a positive value");
  }
  return weight;
}

Product::Product(const Weight& weight, int64_t tokens) : weight_(weight), p_(weight.p) {
  p_.tokens = tokens;
  step_ = grain(p_.columns() * BLOCK_ROWS * 2 * tokens);
  high_ = array_of<int16_t>(tokens * p_.columns()), low_ = array_of<int16_t>(tokens * p_.columns());
  segment_ = array_of<Segment>(tokens * p_.segments);
  total_ = array_of<float>(tokens * p_.stride()), scale_ = array_of<float>(tokens);
  p_.high = high_.get(), p_.low = low_.get(), p_.segment = segment_.get(), p_.total = total_.get();
}

void Product::quantize(const uint16_t* x, int64_t token) {
  const Array<int32_t> value = array_of<int32_t>(p_.columns());
  scale_[token] = split(x, weight_, p_, token, value.get(), high_.get(), low_.get(), segment_.get());
}
void Product::quantize(const float* x, int64_t token) {
  const Array<int32_t> value = array_of<int32_t>(p_.columns());
  scale_[token] = split(x, weight_, p_, token, value.get(), high_.get(), low_.get(), segment_.get());
}

void Product::multiply(int64_t piece) {
  weight_.run(p_, piece * step_ * 2, std::min((piece + 1) * step_ * 2, p_.blocks()));
}

void Product::finish(int64_t token, int64_t begin, int64_t end, const uint16_t* bias, uint16_t* y) const {
  outputs(total_.get() + token * p_.stride() + begin, weight_.outer + begin, scale_[token], bias, end - begin, y);
}
void Product::finish(int64_t token, int64_t begin, int64_t end, const float* bias, float* y) const {
  outputs(total_.get() + token * p_.stride() + begin, weight_.outer + begin, scale_[token], bias, end - begin, y);
}

}  // namespace duotone
