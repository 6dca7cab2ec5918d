// What the bindings of the CUDA kernels share. They are compiled twice: as private ops mpoe_cuda::
// for CUDA tensors, and under MPOE_CUDA_EMULATED as mpoe_emulated:: for CPU tensors (tests only),
// whose kernels the emulator runs.
#pragma once
// torch's headers come before CUDA's keywords, which the emulator defines as macros.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/types.h"
#include "cuda/activation.cuh"
#include "cuda/dispatch.h"

#if defined(MPOE_CUDA_EMULATED)
#define MPOE_CUDA_OPS mpoe_emulated
#define MPOE_CUDA_KEY CPU
#else
#define MPOE_CUDA_OPS mpoe_cuda
#define MPOE_CUDA_KEY CUDA
// In libtorch_cuda; the CPU build of torch declares it only under USE_CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace mpoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor that may be left out.
using Optional = std::optional<Tensor>;
inline const void* data_of(const Optional& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}
template <class T>
const T* data_of(const Optional& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace mpoe

namespace mpoe::cuda {

// Makes a tensor's device the current one for this object's lifetime; `stream` is PyTorch's current
// stream there.
class OnDevice {
 public:
#if defined(MPOE_CUDA_EMULATED)
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

inline Dtype kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: refuse("the kernels take float32, bfloat16 and float16");
  }
}

inline int activation_of(const std::string& name) {
  if (name == "none")
    return kNone;
  if (name == "relu")
    return kRelu;
  if (name == "gelu")
    return kGelu;
  if (name == "gelu_tanh")
    return kGeluTanh;
  if (name == "silu")
    return kSilu;
  refuse("unknown activation ", name);
}

// The kernels count rows and columns in 32 bits.
inline int counted(int64_t size, const char* what) {
  require(size <= INT32_MAX, what, " must be below 2^31; got ", size);
  return static_cast<int>(size);
}

// What a call takes as `Memory`, freed with this object; PyTorch's CPU allocator aligns to 64
// bytes.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}
  Memory memory() {
    return [this](std::size_t bytes) {
      taken_.push_back(torch::stable::new_empty(
          like_, {static_cast<int64_t>(bytes + kAlignment)}, ScalarType::Byte));
      const auto address = reinterpret_cast<std::uintptr_t>(taken_.back().mutable_data_ptr());
      return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    };
  }

 private:
  static constexpr std::size_t kAlignment = 256;
  const Tensor& like_;
  std::vector<Tensor> taken_;
};

}  // namespace mpoe::cuda
