#include "cuda/linear/few.h"

#include "cuda/linear/contract.h"
#include "cuda/dispatch.h"
#include "cuda/linear/few.cuh"

namespace mpoe::cuda {
namespace {

void check(const char* axis, int kept, int size) {
  if (kept < 1 || size % kept != 0) {
    throw std::invalid_argument("a block of " + std::to_string(kept) + " indices does not divide " + axis + " = " +
                                std::to_string(size));
  }
}

}  // namespace

std::size_t few_bytes(const FewProduct& product) {
  const int* size = product.dims.size;
  const FewShape& shape = product.shape;
  check("jL", shape.left, size[kJL]);
  check("jC", shape.centre, size[kJC]);
  check("jR", shape.right, size[kJR]);
  if (shape.rows < 1 || shape.rows > kFewThreads) {
    throw std::invalid_argument("a block of " + std::to_string(shape.rows) + " rows; the kernel takes 1 to " +
                                std::to_string(kFewThreads));
  }
  const int64_t rows = int64_t(shape.rows) * shape.left * size[kIR];
  const int64_t sums = kFewThreads * kFewRows * (16 / size_of(product.dtype));
  const int64_t floats = kFewThreads + sums + rows * (int64_t(size[kA]) * size[kIC] + int64_t(size[kB]) * shape.centre);
  return static_cast<std::size_t>(floats) * sizeof(float);
}

void few_product(const FewProduct& product, cudaStream_t stream) {
  const std::size_t shared = few_bytes(product);
  const std::size_t limit = dev::limits().shared_bytes;
  if (shared > limit) {
    throw std::invalid_argument("a block needs " + std::to_string(shared) + " bytes of shared memory; the device has " +
                                std::to_string(limit));
  }
  if (product.slots == 0) return;
  const int* size = product.dims.size;
  const FewShape& shape = product.shape;
  FewArguments p;
  p.x = product.x;
  p.left = product.left;
  p.central = product.central;
  p.right = product.right;
  p.bias = product.epilogue.bias;
  p.y = product.y;
  p.pre_activation = product.epilogue.pre_activation;
  p.offsets = product.offsets;
  p.expert_of_slot = product.expert_of_slot;
  p.row_index = product.row_index;
  p.out_index = product.epilogue.rows;
  p.gates = product.epilogue.gates;
  p.experts = product.experts;
  p.slots = product.slots;
  p.rows = shape.rows;
  p.in_features = product.dims.in_features;
  p.out_features = product.dims.out_features;
  p.activation = product.epilogue.activation;
  p.iL = size[kIL], p.jL = size[kJL], p.a = size[kA];
  p.iC = size[kIC], p.jC = size[kJC], p.b = size[kB];
  p.iR = size[kIR], p.jR = size[kJR];
  p.kept_left = shape.left;
  p.kept_centre = shape.centre;
  p.kept_right = shape.right;
  const int chunk = 16 / static_cast<int>(size_of(product.dtype));
  const auto whole = [&](int extent) { return extent % chunk == 0; };
  p.vector_left = whole(p.a) && aligned(p.left);
  p.vector_central = whole(p.b) && aligned(p.central);
  p.vector_right = whole(p.jR) && whole(p.kept_right) && aligned(p.right);
  const int64_t columns = int64_t(p.jL / shape.left) * (p.jC / shape.centre) * (p.jR / shape.right);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>((p.slots + p.rows - 1) / p.rows));
  with_type(product.dtype, [&](auto zero) {
    LAUNCH(few_kernel<decltype(zero)>, grid, dim3(kFewThreads), shared, stream, p);
    check_launch("few");
  });
}

}  // namespace mpoe::cuda
