// Element types by their number.
#pragma once
#include <stdexcept>

#include "common/types.h"
#include "cuda/device.cuh"

namespace mpoe::cuda {

// Calls f(T{}) with the element type.
template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(dev::bf16{});
    case Dtype::kFloat16: return f(dev::fp16{});
    default: throw std::invalid_argument("CUDA kernels take float32, bfloat16 and float16");
  }
}

}  // namespace mpoe::cuda
