// What launches need on the host: element types by their number, and memory.
#pragma once
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <stdexcept>

#include "common/types.h"
#include "cuda/device.cuh"

namespace mpoe::cuda {

// Memory of so many bytes for one call, aligned to 256.
using Memory = std::function<void*(std::size_t bytes)>;
template <class T>
T* take(const Memory& memory, int64_t count) {
  return static_cast<T*>(memory(static_cast<std::size_t>(count) * sizeof(T)));
}

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
// Whether lines of so many elements from aligned arrays are whole chunks of 16 bytes.
inline bool whole(int chunk,
                  std::initializer_list<int> lines,
                  std::initializer_list<const void*> arrays) {
  bool are = true;
  for (const int elements : lines)
    are = are && elements % chunk == 0;
  for (const void* array : arrays)
    are = are && reinterpret_cast<std::uintptr_t>(array) % 16 == 0;
  return are;
}

}  // namespace mpoe::cuda
