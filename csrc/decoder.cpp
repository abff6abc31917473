// What a decoder does between its linears, for one new token of each sequence: in BF16, with sums in float32.
// src/duotone/runtime/decoder.py says where they stand; each does what a few of torch's small ops do.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "floats.h"
#include "tensors.h"

namespace duotone {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t LANES = 16;

const uint16_t* bf16_of(const Tensor& tensor, const char* name) {
  return data_of<uint16_t>(tensor, ScalarType::BFloat16, name);
}
uint16_t* written(Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

// Sixteen sums side by side, then added up: an order that compilers can vectorize.
DUOTONE_INLINE float dot(const float* a, const float* b, int64_t size) {
  float sum[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (int64_t j = 0; j < LANES; j++) sum[j] += a[i + j] * b[i + j];
  for (; i < size; i++) sum[i % LANES] += a[i] * b[i];
#pragma GCC unroll 4
  for (int64_t half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int64_t k = 0; k < half; k++) sum[k] += sum[k + half];
  return sum[0];
}

DUOTONE_CLONES void norm_row(const uint16_t* x, const uint16_t* weight, int64_t size, float eps, float* wide, uint16_t* y) {
  for (int64_t i = 0; i < size; i++) wide[i] = widen(x[i]);
  const float scale = 1.0f / std::sqrt(dot(wide, wide, size) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; i++) narrow(rounded(wide[i] * scale) * widen(weight[i]), y[i]);
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const uint16_t *from = bf16_of(x, "x"), *scale = bf16_of(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 1 && x.dim() >= 1 && x.size(-1) == weight.size(0), "x: expected shape [..., D] as weight");
  const int64_t size = weight.size(0), rows = size ? x.numel() / size : 0;
  Tensor y = torch::stable::empty_like(x);
  std::vector<float> wide(static_cast<size_t>(size));
  for (int64_t r = 0; r < rows; r++)
    norm_row(from + r * size, scale, size, static_cast<float>(eps), wide.data(), written(y) + r * size);
  return y;
}

// Each head of a token: its two halves turned against each other. Rounded where the small ops would round.
DUOTONE_CLONES void turn_heads(uint16_t* x, const uint16_t* cosine, const uint16_t* sine, int64_t heads, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t h = 0; h < heads; h++, x += size)
    for (int64_t i = 0; i < half; i++) {
      const float first = widen(x[i]), second = widen(x[i + half]);
      narrow(rounded(first * widen(cosine[i])) + rounded(-second * widen(sine[i])), x[i]);
      narrow(rounded(second * widen(cosine[i + half])) + rounded(first * widen(sine[i + half])), x[i + half]);
    }
}

// x [B, H * D], cosine and sine [B, D] or [1, D]: in place.
void rotate(Tensor x, Tensor cosine, Tensor sine) {
  const uint16_t *turn = bf16_of(cosine, "cosine"), *shift = bf16_of(sine, "sine");
  bf16_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && cosine.dim() == 2 && cosine.size(1) > 0, "x: expected shape [B, H * D]");
  const int64_t size = cosine.size(1), tokens = x.size(0), shared = cosine.size(0) == 1;
  check_shape(sine, {cosine.size(0), size}, "sine");
  STD_TORCH_CHECK(size % 2 == 0 && x.size(1) % size == 0, "x: expected whole heads of an even size");
  STD_TORCH_CHECK(shared || cosine.size(0) == tokens, "cosine: expected a row for each token, or one");
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t at = shared ? 0 : t * size;
    turn_heads(written(x) + t * x.size(1), turn + at, shift + at, x.size(1) / size, size);
  }
}

DUOTONE_CLONES void gate_values(const uint16_t* gate, const uint16_t* up, int64_t size, uint16_t* y) {
  for (int64_t i = 0; i < size; i++) {
    const float x = widen(gate[i]);
    narrow(rounded(x / (1.0f + exponential(-x))) * widen(up[i]), y[i]);
  }
}

// silu(gate) * up, each step rounded.
Tensor silu_multiply(Tensor gate, Tensor up) {
  const uint16_t *from = bf16_of(gate, "gate"), *by = bf16_of(up, "up");
  STD_TORCH_CHECK(gate.numel() == up.numel(), "up: found another size than gate's");
  Tensor y = torch::stable::empty_like(gate);
  uint16_t* to = written(y);
  torch::stable::parallel_for(0, gate.numel(), 16384, [&](int64_t begin, int64_t end) {
    gate_values(from + begin, by + begin, end - begin, to + begin);
  });
  return y;
}

// The query heads of one key head. scores [queries][length], wide [(queries + 1) * size]: room to work in.
DUOTONE_CLONES void attend_head(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t queries, int64_t length,
                                int64_t size, float scale, float* scores, float* wide, uint16_t* y) {
  float* row = wide + queries * size;
  for (int64_t i = 0; i < queries * size; i++) wide[i] = widen(q[i]) * scale;
  for (int64_t l = 0; l < length; l++) {
    for (int64_t i = 0; i < size; i++) row[i] = widen(k[l * size + i]);
    for (int64_t h = 0; h < queries; h++) scores[h * length + l] = dot(wide + h * size, row, size);
  }
  for (int64_t i = 0; i < queries * size; i++) wide[i] = 0.0f;
  for (int64_t h = 0; h < queries; h++) {
    float* of = scores + h * length;
    const float largest = *std::max_element(of, of + length);
    for (int64_t l = 0; l < length; l++) of[l] = exponential(of[l] - largest);
    float sum = 0.0f;
    for (int64_t l = 0; l < length; l++) sum += of[l];
    for (int64_t l = 0; l < length; l++) of[l] /= sum;
  }
  for (int64_t l = 0; l < length; l++) {
    for (int64_t i = 0; i < size; i++) row[i] = widen(v[l * size + i]);
    for (int64_t h = 0; h < queries; h++)
      for (int64_t i = 0; i < size; i++) wide[h * size + i] += scores[h * length + l] * row[i];
  }
  for (int64_t i = 0; i < queries * size; i++) narrow(wide[i], y[i]);
}

// q [B, H * D], k and v [B, H', L, D] -> [B, H * D]: each token sees all of its sequence.
Tensor attend(Tensor q, Tensor k, Tensor v, double scale) {
  const uint16_t *query = bf16_of(q, "q"), *key = bf16_of(k, "k"), *value = bf16_of(v, "v");
  STD_TORCH_CHECK(k.dim() == 4 && k.size(1) > 0 && k.size(2) > 0 && k.size(3) > 0, "k: expected shape [B, H, L, D]");
  const int64_t batch = k.size(0), heads = k.size(1), length = k.size(2), size = k.size(3);
  check_shape(v, {batch, heads, length, size}, "v");
  STD_TORCH_CHECK(q.dim() == 2 && q.size(0) == batch && q.size(1) > 0 && q.size(1) % (heads * size) == 0,
                  "q: expected shape [B, H * D]");
  const int64_t queries = q.size(1) / (heads * size);
  Tensor y = torch::stable::empty_like(q);
  uint16_t* to = written(y);
  const int64_t grain = std::max<int64_t>(1, 65536 / (queries * length * size));
  torch::stable::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(static_cast<size_t>(queries * length)), wide(static_cast<size_t>((queries + 1) * size));
    for (int64_t h = begin; h < end; h++) {
      const int64_t of_q = h * queries * size, of_k = h * length * size;
      attend_head(query + of_q, key + of_k, value + of_k, queries, length, size, static_cast<float>(scale), scores.data(),
                  wide.data(), to + of_q);
    }
  });
  return y;
}

}  // namespace
}  // namespace duotone

STABLE_TORCH_LIBRARY_FRAGMENT(duotone, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotate(Tensor(a!) x, Tensor cosine, Tensor sine) -> ()");
  m.def("silu_multiply(Tensor gate, Tensor up) -> Tensor");
  m.def("attend(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&duotone::rms_norm));
  m.impl("rotate", TORCH_BOX(&duotone::rotate));
  m.impl("silu_multiply", TORCH_BOX(&duotone::silu_multiply));
  m.impl("attend", TORCH_BOX(&duotone::attend));
}
