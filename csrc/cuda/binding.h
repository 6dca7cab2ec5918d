// Checks and conversions that the bindings to torch share. Only csrc/cuda/*/bind.cpp include it: kernels know
// nothing about torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "common/types.h"

namespace mpoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reports what the caller did wrong. mpoe_kernels/define.py turns the text after the colon into a ValueError;
// STD_TORCH_CHECK would add the path of our source file.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "mpoe refuses: ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

#define MPOE_CHECK(condition, ...)                  \
  do {                                              \
    if (!(condition)) ::mpoe::refuse(__VA_ARGS__);  \
  } while (false)

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: MPOE_CHECK(false, name, " must have dtype float32, float64, bfloat16 or float16");
  }
}

inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Dense int64 values of a tensor with `dim` axes.
inline Tensor dense_index(const Tensor& tensor, int64_t dim, const char* name) {
  MPOE_CHECK(tensor.dim() == dim, name, " must have ", dim, " axes; got ", tensor.dim());
  return dense(cast(tensor, ScalarType::Long));
}

}  // namespace mpoe
