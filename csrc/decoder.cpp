// What a decoder of the Llama kind does beside its linears, in BF16 with sums in float32, and whole layers of it for one
// new token of each sequence. src/duotone/runtime/decoder.py says where these stand.
#define TORCH_TARGET_VERSION 0x020a000000000000ULL

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "crew.h"
#include "floats.h"
#include "linear_parts.h"
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

// What attention sees of a key or a value that is kept: BF16 numbers. Bytes are copied first, since a compiler must take any
// store for one to them, and would do one after the other.
DUOTONE_INLINE void seen(const uint16_t* kept, int64_t size, float, float* to) {
  for (int64_t i = 0; i < size; i++) to[i] = widen(kept[i]);
}
DUOTONE_INLINE void seen(const Fp8* kept, int64_t size, float scale, float* to) {
  constexpr int64_t AT_ONCE = 256;
  Fp8 some[AT_ONCE];
  for (int64_t i = 0; i < size; i += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, size - i);
    std::memcpy(some, kept + i, static_cast<size_t>(count));
    for (int64_t j = 0; j < count; j++) to[i + j] = scaled(some[j], scale);
  }
}

// The query heads of one key head. scores [queries][length], wide [(queries + 1) * size]: room to work in.
template <class Kept>
DUOTONE_INLINE void attend_kept(const uint16_t* q, const Kept* k, const Kept* v, int64_t queries, int64_t length, int64_t size,
                                float scale, float of_keys, float of_values, float* scores, float* wide, uint16_t* y) {
  float* row = wide + queries * size;
  for (int64_t i = 0; i < queries * size; i++) wide[i] = widen(q[i]) * scale;
  for (int64_t l = 0; l < length; l++) {
    seen(k + l * size, size, of_keys, row);
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
    seen(v + l * size, size, of_values, row);
    for (int64_t h = 0; h < queries; h++)
      for (int64_t i = 0; i < size; i++) wide[h * size + i] += scores[h * length + l] * row[i];
  }
  for (int64_t i = 0; i < queries * size; i++) narrow(wide[i], y[i]);
}

DUOTONE_CLONES void attend_head(const uint16_t* q, const uint16_t* k, const uint16_t* v, int64_t queries, int64_t length,
                                int64_t size, float scale, float* scores, float* wide, uint16_t* y) {
  attend_kept(q, k, v, queries, length, size, scale, 1.0f, 1.0f, scores, wide, y);
}

DUOTONE_CLONES void attend_head_fp8(const uint16_t* q, const Fp8* k, const Fp8* v, int64_t queries, int64_t length, int64_t size,
                                    float scale, float of_keys, float of_values, float* scores, float* wide, uint16_t* y) {
  attend_kept(q, k, v, queries, length, size, scale, of_keys, of_values, scores, wide, y);
}

// A key or a value as an FP8 cache keeps it.
DUOTONE_CLONES void keep_fp8(const uint16_t* x, int64_t size, float scale, float most, Fp8* to) {
  for (int64_t i = 0; i < size; i++) narrow(widen(x[i]) / scale, most, to[i]);
}

// A quantized linear of a layer, its bias in one piece and what it gives.
struct Step {
  Weight weight;
  Product product;
  Array<uint16_t> bias, y;

  Step(const Tensor* four, const Tensor& input_scale, const Tensor* biases, int64_t count, const WeightFacts& facts,
       int64_t tokens)
      : weight(weight_of(four, input_scale.numel() ? &input_scale : nullptr, facts)), product(weight, tokens) {
    y = array_of<uint16_t>(tokens * rows());
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) found += biases[i].numel();
    if (!found) return;
    STD_TORCH_CHECK(found == rows(), "biases: expected as many values as rows, or none");
    bias = array_of<uint16_t>(found);
    for (int64_t i = 0, at = 0; i < count; at += biases[i++].numel())
      std::copy_n(bf16_of(biases[i], "biases"), biases[i].numel(), bias.get() + at);
  }

  int64_t rows() const { return weight.p.rows; }
  uint16_t* of(int64_t token) const { return y.get() + token * rows(); }

  // All rows of all tokens, added to `residual` where there is one.
  void multiply(Crew::Member& crew, int64_t tokens, const uint16_t* residual = nullptr) {
    crew.each(product.pieces(), [&](int64_t piece) {
      product.multiply(piece);
      const int64_t begin = product.begin(piece), end = product.end(piece);
      for (int64_t t = 0; t < tokens; t++) {
        uint16_t* to = of(t) + begin;
        product.finish(t, begin, end, bias ? bias.get() + begin : nullptr, to);
        for (int64_t i = 0; residual && i < end - begin; i++)
          narrow(widen(residual[t * rows() + begin + i]) + widen(to[i]), to[i]);
      }
    });
  }
};

// Keys and values so far [B, H, room for tokens, D], and how many there are. BF16; or FP8 up to `most`, with a scale of each
// head's keys and values.
struct Cache {
  void *keys, *values;
  int64_t heads, capacity, size, length;
  const float *key_scale, *value_scale;  // null: BF16
  float most;

  template <class Kept>
  Kept* of(void* all, int64_t token, int64_t head) const {
    return static_cast<Kept*>(all) + (token * heads + head) * capacity * size;
  }
};

struct Norm {
  const uint16_t* weight;
  float eps;
};

constexpr int64_t GATE_PIECE = 2048;  // values

// A layer's new tokens, one of each sequence; x and what it becomes are [B, D].
struct LayerStep {
  int64_t tokens, hidden;
  const uint16_t *x, *cosine, *sine;
  int64_t turn_stride;  // 0 where all sequences are at one position
  Norm norms[4];        // before attention, before the MLP, of queries, of keys; the last two may be null
  Cache cache;
  float scale;
  Step &qkv, &out, &gate_up, &down;

  int64_t kv_rows() const { return cache.heads * cache.size; }
  int64_t queries() const { return (qkv.rows() / cache.size - 2 * cache.heads) / cache.heads; }

  void norm_and_quantize(int64_t token, const uint16_t* from, const Norm& norm, Step& to) const {
    const Array<float> wide = array_of<float>(hidden);
    const Array<uint16_t> y = array_of<uint16_t>(hidden);
    norm_row(from + token * hidden, norm.weight, hidden, norm.eps, wide.get(), y.get());
    to.product.quantize(y.get(), token);
  }

  // The queries of one key head of one token: turned, the new key and value put behind the others, attention.
  void attend(int64_t token, int64_t head, uint16_t* y) const {
    const int64_t count = queries(), size = cache.size, at = token * turn_stride, length = cache.length + 1;
    const Array<float> scores = array_of<float>(count * length), wide = array_of<float>((count + 1) * size);
    uint16_t* q = qkv.of(token) + head * count * size;
    uint16_t* k = qkv.of(token) + qkv.rows() - 2 * kv_rows() + head * size;
    const uint16_t* v = k + kv_rows();
    for (int64_t h = 0; norms[2].weight && h < count; h++)
      norm_row(q + h * size, norms[2].weight, size, norms[2].eps, wide.get(), q + h * size);
    if (norms[3].weight) norm_row(k, norms[3].weight, size, norms[3].eps, wide.get(), k);
    turn_heads(q, cosine + at, sine + at, count, size), turn_heads(k, cosine + at, sine + at, 1, size);
    y += (token * cache.heads + head) * count * size;
    if (cache.key_scale) {
      Fp8 *keys = cache.of<Fp8>(cache.keys, token, head), *values = cache.of<Fp8>(cache.values, token, head);
      const float of_keys = cache.key_scale[head], of_values = cache.value_scale[head];
      keep_fp8(k, size, of_keys, cache.most, keys + cache.length * size);
      keep_fp8(v, size, of_values, cache.most, values + cache.length * size);
      attend_head_fp8(q, keys, values, count, length, size, scale, of_keys, of_values, scores.get(), wide.get(), y);
      return;
    }
    uint16_t *keys = cache.of<uint16_t>(cache.keys, token, head), *values = cache.of<uint16_t>(cache.values, token, head);
    std::copy_n(k, size, keys + cache.length * size), std::copy_n(v, size, values + cache.length * size);
    attend_head(q, keys, values, count, length, size, scale, scores.get(), wide.get(), y);
  }

  void run(Crew::Member& crew, uint16_t* attended, uint16_t* gated) const {
    const int64_t inner = gate_up.rows() / 2, each = queries() * kv_rows(), gates = (inner + GATE_PIECE - 1) / GATE_PIECE;
    crew.each(tokens, [&](int64_t t) { norm_and_quantize(t, x, norms[0], qkv); });
    qkv.multiply(crew, tokens);
    crew.each(tokens * cache.heads, [&](int64_t i) { attend(i / cache.heads, i % cache.heads, attended); });
    crew.each(tokens, [&](int64_t t) { out.product.quantize(attended + t * each, t); });
    out.multiply(crew, tokens, x);
    crew.each(tokens, [&](int64_t t) { norm_and_quantize(t, out.y.get(), norms[1], gate_up); });
    gate_up.multiply(crew, tokens);
    crew.each(tokens * gates, [&](int64_t i) {
      const int64_t t = i / gates, begin = i % gates * GATE_PIECE, end = std::min(inner, begin + GATE_PIECE);
      gate_values(gate_up.of(t) + begin, gate_up.of(t) + inner + begin, end - begin, gated + t * inner + begin);
    });
    crew.each(tokens, [&](int64_t t) { down.product.quantize(gated + t * inner, t); });
    down.multiply(crew, tokens, out.y.get());
  }
};

Norm norm_of(const Tensor& weight, int64_t size, double eps) {
  check_shape(weight, {size}, "norms");
  return {bf16_of(weight, "norms"), static_cast<float>(eps)};
}

constexpr int64_t WEIGHTS = 20, BIASES = 7, FACTS = 12;  // of a layer

// What layers share: the tokens' places, sizes, and what their arithmetic takes.
struct Stack {
  int64_t tokens, hidden, length;
  const uint16_t *cosine, *sine;
  int64_t turn_stride, size;
  float scale;
  double fp8_max, smallest_scale;
  int64_t path;
};

// The cache of a layer as its op reads it. scales: of its keys and of its values, null where it keeps BF16.
Cache cache_of(const Stack& of, Tensor& keys, Tensor& values, const Tensor* scales) {
  STD_TORCH_CHECK(keys.dim() == 4 && keys.size(0) == of.tokens && keys.size(1) > 0 && keys.size(3) == of.size,
                  "keys: expected shape [B, H, room, D], D as cosine");
  const int64_t heads = keys.size(1), capacity = keys.size(2);
  check_shape(values, {of.tokens, heads, capacity, of.size}, "values");
  STD_TORCH_CHECK(of.length < capacity, "length: found no room for another token");
  const ScalarType kept = scales ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;
  data_of<void>(keys, kept, "keys"), data_of<void>(values, kept, "values");
  Cache cache{keys.mutable_data_ptr(), values.mutable_data_ptr(), heads, capacity, of.size, of.length, nullptr, nullptr,
              static_cast<float>(of.fp8_max)};
  if (!scales) return cache;
  for (int64_t i = 0; i < 2; i++) check_shape(scales[i], {heads}, "kv_scales");
  cache.key_scale = data_of<float>(scales[0], ScalarType::Float, "kv_scales");
  cache.value_scale = data_of<float>(scales[1], ScalarType::Float, "kv_scales");
  return cache;
}

// One layer: x [B, D] to y, its new keys and values into the cache. norms, weights, biases, facts, eps: its own.
void run_layer(const Stack& of, const Cache& cache, const Tensor* norms, int64_t norm_count, const Tensor* weights,
               const Tensor* biases, const int64_t* facts, const double* eps, const uint16_t* x, uint16_t* y) {
  const auto step = [&](int64_t i, int64_t bias, int64_t count) {
    const WeightFacts own{facts[i * 3], facts[i * 3 + 1], facts[i * 3 + 2], of.fp8_max, of.smallest_scale, of.path};
    return Step(&weights[i * 5], weights[i * 5 + 4], &biases[bias], count, own, of.tokens);
  };
  Step qkv = step(0, 0, 3), out = step(1, 3, 1), gate_up = step(2, 4, 2), down = step(3, 6, 1);
  const int64_t attended = out.weight.p.in_features, inner = down.weight.p.in_features, kv = cache.heads * of.size;
  STD_TORCH_CHECK(qkv.weight.p.in_features == of.hidden && gate_up.weight.p.in_features == of.hidden && out.rows() == of.hidden &&
                      down.rows() == of.hidden && gate_up.rows() == 2 * inner && qkv.rows() == attended + 2 * kv &&
                      attended > 0 && attended % kv == 0,
                  "weights: found sizes that do not fit one another");
  const bool normed = norm_count == 4;
  const LayerStep layer{of.tokens,
                        of.hidden,
                        x,
                        of.cosine,
                        of.sine,
                        of.turn_stride,
                        {norm_of(norms[0], of.hidden, eps[0]), norm_of(norms[1], of.hidden, eps[1]),
                         normed ? norm_of(norms[2], of.size, eps[2]) : Norm{}, normed ? norm_of(norms[3], of.size, eps[3]) : Norm{}},
                        cache,
                        of.scale,
                        qkv,
                        out,
                        gate_up,
                        down};
  const Array<uint16_t> heads_out = array_of<uint16_t>(of.tokens * attended), gated = array_of<uint16_t>(of.tokens * inner);
  Crew::run([&](Crew::Member& crew) { layer.run(crew, heads_out.get(), gated.get()); });
  std::copy_n(down.y.get(), of.tokens * of.hidden, y);
}

// Layers one after the other. x [B, 1, D]; cosine and sine [B or 1, 1, head size]; of each layer keys and values
// [B, H, room, head size], of which `length` are there; kv_scales: where those are FP8, of each layer's keys and values [H],
// otherwise nothing; norms: before attention and MLP, and of queries and keys or not;
// weights: four of each linear (Weight) and its input scale, empty where it has none: q/k/v as one, o, gate/up as one, down;
// biases: of q, k, v, o, gate, up, down, empty where there is none; facts: columns, group_size, value_bias of each linear;
// eps: of each norm.
Tensor decoder_layers(Tensor x, Tensor cosine, Tensor sine, std::vector<Tensor> keys, std::vector<Tensor> values,
                      std::vector<Tensor> kv_scales, int64_t length, std::vector<Tensor> norms, std::vector<Tensor> weights,
                      std::vector<Tensor> biases, std::vector<int64_t> facts, std::vector<double> eps, double scale,
                      double fp8_max, double smallest_scale, int64_t path) {
  const int64_t layers = static_cast<int64_t>(keys.size()), count = layers ? static_cast<int64_t>(norms.size()) / layers : 0;
  const auto fits = [&](const auto& list, int64_t each) { return static_cast<int64_t>(list.size()) == layers * each; };
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == 1 && x.size(0) > 0, "x: expected shape [B, 1, D]");
  STD_TORCH_CHECK(fits(values, 1), "values: expected as many as keys");
  STD_TORCH_CHECK(kv_scales.empty() || fits(kv_scales, 2), "kv_scales: expected two a layer, or none");
  STD_TORCH_CHECK((count == 2 || count == 4) && fits(norms, count) && fits(eps, count), "norms: expected two or four a layer");
  STD_TORCH_CHECK(fits(weights, WEIGHTS) && fits(biases, BIASES) && fits(facts, FACTS), "weights: expected those of four linears");
  STD_TORCH_CHECK(length >= 0, "length: found no room for another token");
  const int64_t tokens = x.size(0), hidden = x.size(2);
  STD_TORCH_CHECK(cosine.dim() == 3 && (cosine.size(0) == 1 || cosine.size(0) == tokens) && cosine.size(1) == 1 &&
                      cosine.size(2) > 0 && cosine.size(2) % 2 == 0,
                  "cosine: expected an even row for each token, or one");
  const int64_t size = cosine.size(2);
  check_shape(sine, {cosine.size(0), 1, size}, "sine");
  const Stack stack{tokens, hidden, length, bf16_of(cosine, "cosine"), bf16_of(sine, "sine"), cosine.size(0) == 1 ? 0 : size,
                    size, static_cast<float>(scale), fp8_max, smallest_scale, path};
  Tensor y = torch::stable::empty_like(x);
  const uint16_t* from = bf16_of(x, "x");
  for (int64_t l = 0; l < layers; l++, from = written(y))
    run_layer(stack, cache_of(stack, keys[l], values[l], kv_scales.empty() ? nullptr : &kv_scales[l * 2]), &norms[l * count], count, &weights[l * WEIGHTS], &biases[l * BIASES],
              &facts[l * FACTS], &eps[l * count], from, written(y));
  return y;
}

// Rows [begin, end) of a BF16 weight times one token.
DUOTONE_CLONES void dense_rows(const uint16_t* weight, const float* x, int64_t columns, int64_t begin, int64_t end, uint16_t* y) {
  constexpr int64_t AHEAD = 1024;
  for (int64_t n = begin; n < end; n++) {
    const uint16_t* row = weight + n * columns;
    float sum[2 * LANES] = {};
    int64_t k = 0;
    for (; k + 2 * LANES <= columns; k += 2 * LANES) {
      __builtin_prefetch(row + k + AHEAD);
      for (int64_t j = 0; j < 2 * LANES; j++) sum[j] += widen(row[k + j]) * x[k + j];
    }
    for (; k < columns; k++) sum[k % LANES] += widen(row[k]) * x[k];
    float all = 0.0f;
    for (int64_t j = 0; j < 2 * LANES; j++) all += sum[j];
    narrow(all, y[n]);
  }
}

// A linear left in BF16, for few tokens: x [..., K] times weight [N, K], at the speed of memory.
Tensor dense(Tensor x, Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0 && x.dim() >= 1 && x.size(-1) == weight.size(1),
                  "x: expected shape [..., K] as weight");
  const int64_t rows = weight.size(0), columns = weight.size(1), tokens = x.numel() / columns;
  const uint16_t *from = bf16_of(x, "x"), *by = bf16_of(weight, "weight");
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); i++) shape.push_back(x.size(i));
  shape.push_back(rows);
  Tensor y = torch::stable::new_empty(x, shape);
  uint16_t* to = written(y);
  const Array<float> wide = array_of<float>(tokens * columns);
  for (int64_t i = 0; i < tokens * columns; i++) wide[i] = widen(from[i]);
  constexpr int64_t PIECE = 64;
  Crew::run([&](Crew::Member& crew) {
    crew.each((rows + PIECE - 1) / PIECE, [&](int64_t i) {
      const int64_t begin = i * PIECE, end = std::min(rows, begin + PIECE);
      for (int64_t t = 0; t < tokens; t++) dense_rows(by, wide.get() + t * columns, columns, begin, end, to + t * rows);
    });
  });
  return y;
}

}  // namespace
}  // namespace duotone

STABLE_TORCH_LIBRARY_FRAGMENT(duotone, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_multiply(Tensor gate, Tensor up) -> Tensor");
  m.def("dense(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "decoder_layers(Tensor x, Tensor cosine, Tensor sine, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] kv_scales, "
      "int length, Tensor[] norms, Tensor[] weights, Tensor[] biases, int[] facts, float[] eps, float scale, float fp8_max, float smallest_scale, int path) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(duotone, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&duotone::rms_norm));
  m.impl("silu_multiply", TORCH_BOX(&duotone::silu_multiply));
  m.impl("dense", TORCH_BOX(&duotone::dense));
  m.impl("decoder_layers", TORCH_BOX(&duotone::decoder_layers));
}
