// The W4A8 linear as an op: activations to FP8, the product, scales, bias. src/duotone/kernels/cpu.py says what it computes,
// src/duotone/kernels/reference.py is the specification.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "floats.h"
#include "linear_kernels.h"
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

// The paths this machine can run, as a sum of 1 << path.
int64_t linear_paths() {
  int64_t found = 0;
  for (int64_t path : {PORTABLE, AVX2, AVX512, AVX512VNNI}) found |= supported(path) ? int64_t{1} << path : 0;
  return found;
}

// A chunk of a row in the order of linear_kernels.h.
DUOTONE_INLINE void pack_chunk(const uint8_t* code, uint8_t* bytes) {
  for (int i = 0; i < CHUNK_BYTES; i++) {
    const int column = i % 2 * 8 + i / 2;
    bytes[i] = static_cast<uint8_t>(code[column] | code[column + CHUNK / 2] << 4);
  }
}

// Codes of any number of rows and columns, packed; what is added to fill a block is code 0.
Tensor pack_codes(Tensor codes) {
  STD_TORCH_CHECK(codes.dim() == 2, "codes: expected two dimensions");
  const uint8_t* from = data_of<uint8_t>(codes, ScalarType::Byte, "codes");
  const int64_t rows = codes.size(0), columns = codes.size(1);
  const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, chunks = (columns + CHUNK - 1) / CHUNK;
  Tensor packed = torch::stable::new_empty(codes, {blocks, chunks, BLOCK_ROWS / 2, 2, CHUNK_BYTES});
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      for (int64_t r = 0; r < BLOCK_ROWS; r++) {
        const int64_t row = block * BLOCK_ROWS + r % 2 * 4 + r / 2;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          uint8_t code[CHUNK] = {};
          if (row < rows) std::memcpy(code, from + row * columns + chunk * CHUNK, std::min(CHUNK, columns - chunk * CHUNK));
          pack_chunk(code, to + ((block * chunks + chunk) * BLOCK_ROWS + r) * CHUNK_BYTES);
        }
      }
  });
  return packed;
}

// How activations become FP8: a static scale, or 0 for one a token, no smaller than `smallest`.
struct Rounding {
  float scale, fp8_max, smallest;
};

// Activations as the paths read them, which linear_kernels.h describes.
struct Split {
  int16_t *high, *low;
  Segment* segment;
};

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

// One token's values on the FP8 grid; returns its scale, NaN for a token that holds what is no number.
template <typename T>
DUOTONE_INLINE float quantize_token(const T* x, const Linear& p, int64_t token, int64_t columns, const Rounding& how,
                                    int32_t* value, const Split& to) {
  uint32_t largest = 0;  // without their sign, floats rise with their bits, NaN above all
  for (int64_t k = 0; k < columns; k++) largest = std::max(largest, bits_of(widen(x[k])) & 0x7FFFFFFFu);
  constexpr uint32_t infinity = 0x7F800000u;
  const bool number = how.scale == 0.0f ? largest < infinity : largest <= infinity;  // a static scale clamps infinities
  float scale = how.scale;
  if (scale == 0.0f) {
    std::memcpy(&scale, &largest, 4);
    scale /= how.fp8_max;
    scale = scale < how.smallest ? how.smallest : scale;
  }
  if (!number) scale = std::numeric_limits<float>::quiet_NaN();
  for (int64_t k = 0; k < columns; k++) {
    const float fp8 = number ? fp8_round(clamp(widen(x[k]) / scale, -how.fp8_max, how.fp8_max)) : 0.0f;
    value[k] = static_cast<int32_t>(fp8 / LOW_SCALE);
  }
  for (int64_t k = columns; k < p.columns(); k++) value[k] = 0;
  for (int64_t s = 0; s < p.segments; s++) {
    const int64_t at = p.at(s, token);
    to.segment[s * p.tokens + token] =
        split_segment(value + s * p.segment_chunks * CHUNK, p.chunks_of(s), to.high + at, to.low + at);
  }
  return scale;
}

DUOTONE_CLONES float quantize(const uint16_t* x, const Linear& p, int64_t token, int64_t columns, const Rounding& how,
                              int32_t* value, const Split& to) {
  return quantize_token(x, p, token, columns, how, value, to);
}
DUOTONE_CLONES float quantize(const float* x, const Linear& p, int64_t token, int64_t columns, const Rounding& how,
                              int32_t* value, const Split& to) {
  return quantize_token(x, p, token, columns, how, value, to);
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
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Array = std::unique_ptr<T[], Freed>;

template <typename T>
Array<T> array_of(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  T* memory = static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64)));
  STD_TORCH_CHECK(memory, "out of memory: a linear could not allocate its activations");
  return Array<T>(memory);
}

// Work of about 256 thousand multiplications is worth a thread.
int64_t grain(int64_t each) { return std::max<int64_t>(1, 262144 / std::max<int64_t>(1, each)); }

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
  const int64_t group_chunks = group_size / CHUNK;
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
  return p;
}

// What comes of a product: y is [M, N], or one after the other [M, rows] of each part where several weights are one.
template <typename T>
struct Result {
  const float* outer;
  const T* bias;
  const int64_t* part;  // rows of each
  int64_t parts;
  T* y;

  void finish_token(const Linear& p, int64_t m, const float* total, float scale) const {
    for (int64_t i = 0, row = 0; i < parts; row += part[i++])
      finish(total + row, outer + row, scale, bias ? bias + row : nullptr, part[i], y + row * p.tokens + m * part[i]);
  }
};

template <typename T>
void multiply(Linear p, const T* x, int64_t columns, const Rounding& how, const Result<T>& to, LinearPath run) {
  const int64_t padded = p.columns(), stride = p.stride();
  const Array<int16_t> high = array_of<int16_t>(p.tokens * padded), low = array_of<int16_t>(p.tokens * padded);
  const Array<Segment> segment = array_of<Segment>(p.tokens * p.segments);
  const Array<float> total = array_of<float>(p.tokens * stride), scale = array_of<float>(p.tokens);
  p.high = high.get(), p.low = low.get(), p.segment = segment.get(), p.total = total.get();
  const Split split{high.get(), low.get(), segment.get()};
  torch::stable::parallel_for(0, p.tokens, grain(padded * 4), [&](int64_t begin, int64_t end) {
    const Array<int32_t> value = array_of<int32_t>(padded);
    for (int64_t m = begin; m < end; m++) scale[m] = quantize(x + m * columns, p, m, columns, how, value.get(), split);
  });
  // Whoever is free takes the next piece: cores are not alike, and not always ours. Pieces are pairs of blocks, which share a
  // panel, and as many of them as are worth the asking.
  const int64_t pairs = (p.blocks() + 1) / 2, each = padded * BLOCK_ROWS * 2 * p.tokens, step = grain(each);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, pairs, step, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(step)) < pairs;) run(p, begin * 2, std::min((begin + step) * 2, p.blocks()));
  });
  torch::stable::parallel_for(0, p.tokens, grain(p.rows * 4), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) to.finish_token(p, m, total.get() + m * stride, scale[m]);
  });
}

// The rows of each part, checked: they are those of the weight, and every part but the last begins a block.
const int64_t* parts_of(const Tensor& parts, int64_t rows) {
  const int64_t* part = data_of<int64_t>(parts, ScalarType::Long, "parts");
  int64_t sum = 0;
  for (int64_t i = 0; i < parts.numel(); sum += part[i++])
    STD_TORCH_CHECK(part[i] >= 0 && part[i] <= rows - sum && sum % BLOCK_ROWS == 0,
                    "parts: expected multiples of 8 rows but for the last, and no more than the weight has");
  STD_TORCH_CHECK(sum == rows, "parts: expected as many rows as the weight has");
  return part;
}

Tensor linear(Tensor x, Tensor codes, Tensor index, Tensor table, Tensor outer_scale, std::optional<Tensor> input_scale,
              std::optional<Tensor> bias, std::optional<Tensor> parts, int64_t columns, int64_t group_size,
              int64_t value_bias, double fp8_max, double smallest_scale, int64_t path) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == columns && columns > 0, "x: expected shape [..., K]");
  STD_TORCH_CHECK(supported(path), "path: this machine cannot run it");
  STD_TORCH_CHECK(outer_scale.dim() == 1, "outer_scale: expected shape [N]");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float, "x: expected bfloat16 or float32");
  Linear p = weight_of(codes, index, table, outer_scale.size(0), columns, group_size);
  p.tokens = x.numel() / columns, p.bias = static_cast<int32_t>(value_bias);
  const float* outer = data_of<float>(outer_scale, ScalarType::Float, "outer_scale");
  Rounding how{0.0f, static_cast<float>(fp8_max), static_cast<float>(smallest_scale)};
  if (input_scale) {
    STD_TORCH_CHECK(input_scale->numel() == 1, "input_scale: expected one value");
    how.scale = *data_of<float>(*input_scale, ScalarType::Float, "input_scale");
    STD_TORCH_CHECK(how.scale > 0.0f, "input_scale: expected a positive value");
  }
  if (bias) check_shape(*bias, {p.rows}, "bias");
  const int64_t* part = parts ? parts_of(*parts, p.rows) : &p.rows;
  std::vector<int64_t> shape{p.tokens * p.rows};
  if (!parts) {
    shape.clear();
    for (int64_t i = 0; i + 1 < x.dim(); i++) shape.push_back(x.size(i));
    shape.push_back(p.rows);
  }
  Tensor y = torch::stable::new_empty(x, shape);
  if (!p.tokens || !p.rows) return y;
  const auto call = [&]<typename T>(T*) {
    const T* added = bias ? data_of<T>(*bias, type, "bias") : nullptr;
    const Result<T> to{outer, added, part, parts ? parts->numel() : 1, static_cast<T*>(y.mutable_data_ptr())};
    multiply(p, data_of<T>(x, type, "x"), columns, how, to, path_of(path));
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
      "Tensor? parts, int columns, int group_size, int value_bias, float fp8_max, float smallest_scale, int path) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&duotone::pack_codes));
  m.impl("linear", TORCH_BOX(&duotone::linear));
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CompositeExplicitAutograd, m) { m.impl("linear_paths", TORCH_BOX(&duotone::linear_paths)); }
