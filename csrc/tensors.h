// What an op checks before it reads a tensor through a pointer.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace duotone {

// Reading through a pointer trusts these; the Python side has already put tensors into this form.
template <typename T>
const T* data_of(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, ": expected a contiguous CPU tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": found another type than expected");
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline void check_shape(const torch::stable::Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && tensor.size(i++) == size;
  STD_TORCH_CHECK(same, name, ": found another shape than expected");
}

}  // namespace duotone
