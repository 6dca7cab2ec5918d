// Rows of a table kept as an MPO, on raw device pointers. Row number = (iL, iC, iR): the rows of left are gathered by
// iL, the slice of central that a row needs is its "expert" iC, and the slice of right its expert iR. So two grouped
// products, each after a counting sort, give the rows; the table itself is never built.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/named.h"

namespace mpoe::cuda {

// dims.in_features: size of the vocabulary; dims.out_features: of an embedding. iL, iC and iR are at most 4096 each.
struct EmbeddingInputs {
  Dtype dtype = Dtype::kFloat32;
  Dims dims;
  bool tf32 = false;
  const int64_t* ids = nullptr;  // [T]; an id outside the vocabulary gives a row of zeros
  int tokens = 0;                // T
  const void* left = nullptr;    // [iL, jL, a]
  const void* central = nullptr;  // [a, iC, jC, b]
  const void* right = nullptr;   // [b, iR, jR]
};
struct EmbeddingForward : EmbeddingInputs {
  void* y = nullptr;  // [T, F]
};
struct EmbeddingBackward : EmbeddingInputs {
  const void* grad = nullptr;  // [T, F]
  void *dleft = nullptr, *dcentral = nullptr, *dright = nullptr;  // like the blocks; all are computed
};

// Bytes of scratch memory, aligned to 256, that a call needs.
std::size_t workspace_bytes(const EmbeddingForward& arguments);
std::size_t workspace_bytes(const EmbeddingBackward& arguments);

void embedding_forward(const EmbeddingForward& arguments, void* workspace, cudaStream_t stream);
void embedding_backward(const EmbeddingBackward& arguments, void* workspace, cudaStream_t stream);

}  // namespace mpoe::cuda
