// The W4A8 linear as an op: activations to FP8, the product, scales, bias. src/duotone/kernels/cpu.py says what it computes,
// src/duotone/kernels/reference.py is the specification.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "crew.h"
#include "linear_parts.h"
#include "solver_kernels.h"
#include "tensors.h"

namespace duotone {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory for codes of that shape.
Tensor new_codes(Tensor like, std::vector<int64_t> shape) {
  Tensor codes = torch::stable::new_empty(like, shape);
  use_large_pages(codes.mutable_data_ptr(), codes.numel());
  return codes;
}

// Blocks [begin, end) of rows in the order of linear_kernels.h.
DUOTONE_CLONES void pack_blocks(const uint8_t* from, int64_t rows, int64_t columns, int64_t begin, int64_t end, uint8_t* to) {
  const int64_t chunks = (columns + CHUNK - 1) / CHUNK, whole = columns / CHUNK;
  for (int64_t row = begin * BLOCK_ROWS; row < end * BLOCK_ROWS; row++) {
    const int64_t of_block = row % BLOCK_ROWS, place = of_block % 4 * 2 + of_block / 4;
    uint8_t* bytes = to + (row / BLOCK_ROWS * chunks * BLOCK_ROWS + place) * CHUNK_BYTES;
    for (int64_t c = 0; c < chunks; c++, bytes += BLOCK_BYTES) {
      uint8_t last[CHUNK] = {}, both[CHUNK_BYTES];
      const uint8_t* code = from + row * columns + c * CHUNK;
      if (row >= rows || c == whole) {
        if (row < rows) std::memcpy(last, code, static_cast<size_t>(columns - c * CHUNK));
        code = last;
      }
      for (int64_t i = 0; i < CHUNK_BYTES; i++) both[i] = static_cast<uint8_t>(code[i] | code[i + CHUNK_BYTES] << 4);
      for (int64_t i = 0; i < CHUNK_BYTES / 2; i++) bytes[2 * i] = both[i], bytes[2 * i + 1] = both[i + CHUNK_BYTES / 2];
    }
  }
}

// Blocks [begin, end) in the order of linear_avx512vbmi.cpp, a few steps of all 16 rows at a time.
DUOTONE_CLONES void pack_columns(const uint8_t* from, int64_t rows, int64_t columns, int64_t steps, int64_t begin, int64_t end,
                                 uint8_t* to) {
  constexpr int64_t SOME = 4;  // steps: a chunk
  to += begin * steps * COLUMN_ROWS * 4;
  for (int64_t block = begin; block < end; block++)
    for (int64_t i = 0; i < steps; i += SOME, to += SOME * COLUMN_ROWS * 4) {
      uint32_t tile[SOME][COLUMN_ROWS] = {};
      const int64_t there = std::min(columns - i * COLUMN_STEP, SOME * COLUMN_STEP);
      for (int64_t row = 0; row < COLUMN_ROWS && block * COLUMN_ROWS + row < rows; row++) {
        uint64_t eight[SOME] = {};
        const uint8_t* code = from + (block * COLUMN_ROWS + row) * columns + i * COLUMN_STEP;
        if (there == SOME * COLUMN_STEP) std::memcpy(eight, code, SOME * COLUMN_STEP);
        else if (there > 0) std::memcpy(eight, code, static_cast<size_t>(there));
        for (int64_t j = 0; j < SOME; j++) tile[j][row] = static_cast<uint32_t>(eight[j] | eight[j] >> 28);
      }
      std::memcpy(to, tile, sizeof tile);
    }
}

// Codes of any number of rows and columns, packed in blocks of 8 or 16 rows; what is added to fill a block is code 0.
Tensor pack_codes(Tensor codes, int64_t block_rows) {
  STD_TORCH_CHECK(codes.dim() == 2, "codes: expected two dimensions");
  STD_TORCH_CHECK(block_rows == BLOCK_ROWS || block_rows == COLUMN_ROWS, "block_rows: expected 8 or 16");
  const uint8_t* from = data_of<uint8_t>(codes, ScalarType::Byte, "codes");
  const int64_t rows = codes.size(0), columns = codes.size(1);
  const int64_t blocks = (rows + block_rows - 1) / block_rows, chunks = (columns + CHUNK - 1) / CHUNK;
  const bool by_columns = block_rows == COLUMN_ROWS;
  const int64_t steps = chunks * (CHUNK / COLUMN_STEP);
  Tensor packed = by_columns ? new_codes(codes, {blocks, steps, COLUMN_ROWS, COLUMN_STEP / 2})
                             : new_codes(codes, {blocks, chunks, BLOCK_ROWS / 2, 2, CHUNK_BYTES});
  uint8_t* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    if (by_columns) pack_columns(from, rows, columns, steps, begin, end, to);
    else pack_blocks(from, rows, columns, begin, end, to);
  });
  return packed;
}

DUOTONE_CLONES void split_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i++) {
    to[2 * i] = from[i] & 15;
    to[2 * i + 1] = from[i] >> 4;
  }
}

// The codes of several weights, one after the other.
Tensor join_codes(std::vector<Tensor> parts) {
  STD_TORCH_CHECK(!parts.empty(), "codes: expected some");
  std::vector<int64_t> shape(parts[0].sizes().begin(), parts[0].sizes().end());
  for (size_t i = 1; i < parts.size(); i++) {
    STD_TORCH_CHECK(parts[i].dim() == parts[0].dim(), "codes: expected one layout");
    for (int64_t d = 1; d < parts[0].dim(); d++) STD_TORCH_CHECK(parts[i].size(d) == shape[d], "codes: expected one layout");
    shape[0] += parts[i].size(0);
  }
  Tensor joined = new_codes(parts[0], shape);
  uint8_t* to = static_cast<uint8_t*>(joined.mutable_data_ptr());
  for (const Tensor& part : parts) {
    std::memcpy(to, data_of<uint8_t>(part, ScalarType::Byte, "codes"), static_cast<size_t>(part.numel()));
    to += part.numel();
  }
  return joined;
}

// Two codes of each byte, the lower half first: bytes [...] to codes [..., 2].
Tensor unpack_bytes(Tensor bytes) {
  const uint8_t* from = data_of<uint8_t>(bytes, ScalarType::Byte, "bytes");
  STD_TORCH_CHECK(bytes.dim() == 1, "bytes: expected one dimension");
  Tensor codes = torch::stable::new_empty(bytes, {bytes.size(0), 2});
  uint8_t* to = static_cast<uint8_t*>(codes.mutable_data_ptr());
  torch::stable::parallel_for(0, bytes.size(0), 1 << 16, [&](int64_t begin, int64_t end) {
    split_bytes(from + begin, end - begin, to + 2 * begin);
  });
  return codes;
}

// What comes of a product: y is [M, N], or one after the other [M, rows] of each part where several weights are one.
template <typename T>
struct Result {
  const T* bias;
  const int64_t* part;  // rows of each
  int64_t parts;
  T* y;

  // Of `all` tokens, the one that is number `token` of a product that begins with token `first`.
  void finish(const Product& product, int64_t all, int64_t first, int64_t token) const {
    for (int64_t i = 0, row = 0; i < parts; row += part[i++])
      product.finish(token, row, row + part[i], bias ? bias + row : nullptr, y + row * all + (first + token) * part[i]);
  }
};

// Room for a product of so many tokens, kept from call to call. More at once would read weights less often, and activations from
// the third level of cache, which is slower: those are needed again and again.
constexpr int64_t TOKENS_AT_ONCE = TOKEN_BLOCK;
thread_local Scratch scratch;

template <typename T>
void multiply(const Weight& weight, const T* x, int64_t all, const Result<T>& to) {
  for (int64_t first = 0; first < all; first += TOKENS_AT_ONCE) {
    const int64_t tokens = std::min(TOKENS_AT_ONCE, all - first);
    Product product(weight, tokens, scratch.at_least(Product::bytes(weight, tokens)));
    torch::stable::parallel_for(0, tokens, grain(weight.p.in_features * 4), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) product.quantize(x + (first + m) * weight.p.in_features, m);
    });
    Pieces pieces;
    std::atomic<int64_t> joined{0};
    const int64_t threads = std::min<int64_t>(product.pieces(), torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      pieces.take(product.pieces(), threads, joined.fetch_add(1), [&](int64_t piece) { product.multiply(piece); });
    });
    torch::stable::parallel_for(0, tokens, grain(weight.p.rows * 4), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) to.finish(product, all, first, m);
    });
  }
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
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float, "x: expected bfloat16 or float32");
  const Tensor four[] = {codes, index, table, outer_scale};
  const Weight weight = weight_of(four, input_scale ? &*input_scale : nullptr,
                                  {columns, group_size, value_bias, fp8_max, smallest_scale, path});
  const int64_t tokens = x.numel() / columns, rows = weight.p.rows;
  if (bias) check_shape(*bias, {rows}, "bias");
  const int64_t* part = parts ? parts_of(*parts, rows) : &rows;
  std::vector<int64_t> shape{tokens * rows};
  if (!parts) {
    shape.clear();
    for (int64_t i = 0; i + 1 < x.dim(); i++) shape.push_back(x.size(i));
    shape.push_back(rows);
  }
  Tensor y = torch::stable::new_empty(x, shape);
  if (!tokens || !rows) return y;
  const auto call = [&]<typename T>(T*) {
    const T* added = bias ? data_of<T>(*bias, type, "bias") : nullptr;
    multiply(weight, data_of<T>(x, type, "x"), tokens,
             Result<T>{added, part, parts ? parts->numel() : 1, static_cast<T*>(y.mutable_data_ptr())});
  };
  if (type == ScalarType::BFloat16) call(static_cast<uint16_t*>(nullptr));
  else call(static_cast<float*>(nullptr));
  return y;
}

}  // namespace
}  // namespace duotone

STABLE_TORCH_LIBRARY_FRAGMENT(duotone, m) {
  m.def("linear_paths() -> int");
  m.def("pack_codes(Tensor codes, int block_rows) -> Tensor");
  m.def("join_codes(Tensor[] parts) -> Tensor");
  m.def("unpack_bytes(Tensor bytes) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor codes, Tensor index, Tensor table, Tensor outer_scale, Tensor? input_scale, Tensor? bias, "
      "Tensor? parts, int columns, int group_size, int value_bias, float fp8_max, float smallest_scale, int path) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&duotone::pack_codes));
  m.impl("join_codes", TORCH_BOX(&duotone::join_codes));
  m.impl("unpack_bytes", TORCH_BOX(&duotone::unpack_bytes));
  m.impl("linear", TORCH_BOX(&duotone::linear));
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CompositeExplicitAutograd, m) { m.impl("linear_paths", TORCH_BOX(&duotone::linear_paths)); }
