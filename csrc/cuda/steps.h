// The three contractions that every strategy consists of, on named tensors: rows times a block, a block's gradient from
// rows, and two blocks merged.
#pragma once
#include "cuda/contract.h"
#include "cuda/named.h"
#include "cuda/workspace.h"

namespace mpoe::cuda {

// What all steps of a call share; `first` .. `first + count` are the experts at work, their blocks' data begins there.
struct Context {
  Dtype dtype = Dtype::kFloat32;
  Dims dims;
  bool tf32 = false;
  const int* offsets = nullptr;
  int experts = 0, slots = 0;
  int first = 0, count = 0;
  cudaStream_t stream = nullptr;
  Workspace* workspace = nullptr;

  Named scratch(const Axes& axes, int64_t outer_count) const {
    const int64_t size = dims.elements(axes);
    return named(workspace->take(static_cast<std::size_t>(size * outer_count * size_of(dtype))), axes, dims, size);
  }
};

// out[slot, kept new] = sum over shared axes of rows[slot, kept shared] block[expert, shared new].
// row_index: slot s reads row row_index[s]. zero_tail: clear the rows of `out` that no expert owns.
void rows_times_block(const Context& context, const Named& rows, const Named& block, const Named& out,
                      const int64_t* row_index, bool zero_tail, const Epilogue& epilogue = {});

// out[expert, axes] = sum over the expert's slots and shared axes of rows[slot, ..] grads[slot, ..].
// A shared `out` (outer 0) is float32 and sums over all experts at work; `accumulate` adds to what it holds.
void block_gradient(const Context& context, const Named& rows, const Named& grads, const Named& out,
                    const int64_t* row_index, bool accumulate);

// out[expert, ..] = sum over shared axes of p[expert, ..] q[expert, ..]; zero for experts without slots.
// A shared `out` is float32 and sums over the experts at work too.
void merge_blocks(const Context& context, const Named& p, const Named& q, const Named& out, bool accumulate);

}  // namespace mpoe::cuda
