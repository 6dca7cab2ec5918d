// The three contractions that every strategy consists of, on named tensors: rows times a block, a block's gradient from
// rows, and two blocks merged.
#pragma once
#include "cuda/linear/contract.h"
#include "cuda/named.h"

namespace mpoe::cuda {

// What all steps of a call share. If weights are built for a part of the experts at a time, offsets and the data of
// blocks start with the first of these.
struct Context {
  Dtype dtype = Dtype::kFloat32;
  Dims dims;
  bool tf32 = false;  // multiply float32 as tf32
  const int* offsets = nullptr;  // [E + 1]
  int experts = 0, slots = 0;    // E, N
  cudaStream_t stream = nullptr;
};

// out[slot, kept new] = sum over shared axes of rows[slot, kept shared] block[expert, shared new].
// row_index: slot s reads row row_index[s]. zero_tail: clear the rows of `out` that no expert owns.
void rows_times_block(const Context& context, const Named& rows, const Named& block, const Named& out,
                      const int64_t* row_index, bool zero_tail, const Epilogue& epilogue = {});

// out[expert, axes] = sum over the expert's slots and shared axes of rows[slot, ..] grads[slot, ..].
// A shared `out` (outer 0) is float32, and the sum over all experts is added to it.
void block_gradient(const Context& context, const Named& rows, const Named& grads, const Named& out,
                    const int64_t* row_index);

// out[expert, ..] = sum over shared axes of first[expert, ..] second[expert, ..]; zero for experts without slots.
// `first` has the slowest axis of `out`: the columns then have its fastest one. A shared `out` is as above.
void merge_blocks(const Context& context, const Named& first, const Named& second, const Named& out);

}  // namespace mpoe::cuda
