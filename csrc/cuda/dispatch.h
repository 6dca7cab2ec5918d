// What launches need on the host: refusals, grids, memory, and element types by their number.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "common/types.h"
#include "cuda/device.cuh"

namespace mpoe::cuda {

// Reports what the caller did wrong. mpoe_kernels/cuda_library.py turns the text after the colon
// into a ValueError; STD_TORCH_CHECK would add the path of our source file.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "mpoe refuses: ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition)
    refuse(parts...);
}

// A grid of so many blocks; a kernel numbers those of x by an int.
inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  constexpr int64_t kMostYZ = 65535;
  require(x <= INT32_MAX && y <= kMostYZ && z <= kMostYZ,
          "CUDA takes no grid of ",
          x,
          " x ",
          y,
          " x ",
          z,
          " blocks");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

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
    default: refuse("the kernels take float32, bfloat16 and float16");
  }
}
// Whether lines of so many elements from aligned arrays are whole chunks of 16 bytes.
inline bool can_copy_16_bytes(int chunk,
                              std::initializer_list<int> lines,
                              std::initializer_list<const void*> arrays) {
  for (const int elements : lines) {
    if (elements % chunk != 0)
      return false;
  }
  for (const void* array : arrays) {
    if (reinterpret_cast<std::uintptr_t>(array) % 16 != 0)
      return false;
  }
  return true;
}

}  // namespace mpoe::cuda
