// What the ops that multiply quantized weights share: a weight, checked; its product with some tokens, in steps; outputs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "linear_kernels.h"

namespace duotone {

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

// Memory that is asked for again and again, in large pages.
class Scratch {
 public:
  uint8_t* at_least(int64_t bytes);

 private:
  Array<uint8_t> memory_;
  int64_t bytes_ = 0;
};

// Has the kernel back memory that is read from end to end with large pages, where it knows them: a page of 4 KiB is over before
// what is fetched ahead of it has arrived. To be called before the memory is written. Advice: nothing depends on it.
void use_large_pages(void* memory, int64_t bytes);

// Work of about 256 thousand multiplications is worth a thread.
inline int64_t grain(int64_t each) { return std::max<int64_t>(1, 262144 / std::max<int64_t>(1, each)); }

// The paths this machine can run, as a sum of 1 << path; kernels/cpu.py has their names.
int64_t linear_paths();

// A weight as kernels/cpu.py packs it.
struct Weight {
  Linear p;  // without tokens
  const float* outer;
  const LinearPath* path;
};

// Its tensors: codes, index, table, outer_scale; input_scale or null. Its facts: columns, group_size, value_bias. Checked.
struct WeightFacts {
  int64_t columns, group_size, value_bias;
  double fp8_max, smallest_scale;
  int64_t path;
};
Weight weight_of(const torch::stable::Tensor* four, const torch::stable::Tensor* input_scale, const WeightFacts& facts);

// A weight times some tokens: each token is quantized, each piece of the weight's rows multiplied, in any order and by anybody.
class Product {
 public:
  // In memory of its own, or of `bytes` that are given, beginning with a line of cache.
  Product(const Weight& weight, int64_t tokens, uint8_t* memory = nullptr);
  Product(const Product&) = delete;
  static int64_t bytes(const Weight& weight, int64_t tokens);

  void quantize(const uint16_t* x, int64_t token);
  void quantize(const float* x, int64_t token);

  int64_t pieces() const { return (pairs() + step_ - 1) / step_; }
  void multiply(int64_t piece);
  // The rows of a piece.
  int64_t begin(int64_t piece) const { return piece * step_ * 2 * BLOCK_ROWS; }
  int64_t end(int64_t piece) const { return std::min(begin(piece + 1), p_.rows); }

  // Rows [begin, end) of a token: times both scales, rounded to y's type, the bias, if any, added and rounded again.
  void finish(int64_t token, int64_t begin, int64_t end, const uint16_t* bias, uint16_t* y) const;
  void finish(int64_t token, int64_t begin, int64_t end, const float* bias, float* y) const;

 private:
  int64_t pairs() const { return (p_.blocks() + 1) / 2; }

  const Weight& weight_;
  Linear p_;
  int64_t step_;  // in pairs of blocks, which share a panel
  Array<uint8_t> own_;
  float* scale_;  // [M]
};

}  // namespace duotone
