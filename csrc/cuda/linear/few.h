// Grouped product of few rows in one launch, by the kernel of csrc/cuda/linear/few.cuh.
#pragma once
#include <cstddef>

#include "cuda/named.h"

namespace mpoe::cuda {

// What one block computes: this many indices jL, jC, jR (each divides its axis) of this many rows.
struct FewShape {
  int left = 1, centre = 1, right = 1, rows = 1;
};

struct FewProduct {
  Dtype dtype = Dtype::kFloat32;
  Dims dims;
  FewShape shape;
  const void* x = nullptr;        // [T, I]
  const void* left = nullptr;     // [E, iL, jL, a]
  const void* central = nullptr;  // [a, iC, jC, b]
  const void* right = nullptr;    // [E, b, iR, jR]
  int experts = 0;
  // Which expert owns which slot: slots sorted by expert, or (no routing needed) each slot's expert, negative for none.
  const int* offsets = nullptr;             // [E + 1]
  const int64_t* expert_of_slot = nullptr;  // [N]; null: by offsets
  const int64_t* row_index = nullptr;       // [N]; null: slot s reads row s
  int slots = 0;                            // N
  void* y = nullptr;                        // [N, F]; slots that no expert owns become zero
  Epilogue epilogue;
};

// Bytes of shared memory of one block. Throws std::invalid_argument for a shape that does not divide the axes.
std::size_t few_bytes(const FewProduct& product);

// Throws std::invalid_argument if a block does not fit into the device's shared memory.
void few_product(const FewProduct& product, cudaStream_t stream);

}  // namespace mpoe::cuda
