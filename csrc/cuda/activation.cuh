// Activations of float32 pre-activations.
#pragma once
#include <type_traits>

#include "cuda/device.cuh"

namespace mpoe::cuda {

enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

__device__ __forceinline__ float normal_cdf(float z) {
  return 0.5f * (1.f + erff(z * 0.70710678118654752f));
}
__device__ __forceinline__ float sigmoid(float z) {
  return 1.f / (1.f + expf(-z));
}
__device__ __forceinline__ float gelu_tanh_inner(float z) {
  return 0.79788456080286536f * (z + 0.044715f * z * z * z);
}

__device__ __forceinline__ float activate(int activation, float z) {
  switch (activation) {
    case kRelu: return z > 0.f ? z : (z == z ? 0.f : z);  // NaN stays, as in torch
    case kGelu: return z * normal_cdf(z);
    case kGeluTanh: return 0.5f * z * (1.f + tanhf(gelu_tanh_inner(z)));
    case kSilu: return z * sigmoid(z);
    default: return z;
  }
}

// Calls f with the activation as a constant: a loop inside it does not ask again for every number.
template <class F>
__device__ __forceinline__ void with_activation(int activation, F&& f) {
  switch (activation) {
    case kRelu: return f(std::integral_constant<int, kRelu>{});
    case kGelu: return f(std::integral_constant<int, kGelu>{});
    case kGeluTanh: return f(std::integral_constant<int, kGeluTanh>{});
    case kSilu: return f(std::integral_constant<int, kSilu>{});
    default: return f(std::integral_constant<int, kNone>{});
  }
}

}  // namespace mpoe::cuda
