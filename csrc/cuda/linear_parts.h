// What a linear's forward and backward share: blocks by name, weights built for some experts at a time.
#pragma once
#include <algorithm>
#include <map>
#include <string>

#include "cuda/linear.h"
#include "cuda/program.h"
#include "cuda/steps.h"

namespace mpoe::cuda {

using Blocks = std::map<std::string, Named>;

// The blocks of experts first .. first + count; a shared block stays as it is.
inline Named of_experts(const Named& block, int first, Dtype dtype) {
  Named part = block;
  part.data = static_cast<char*>(part.data) + block.outer * first * size_of(dtype);
  return part;
}

// Experts whose built weights, and as many gradients, fit two whole weights.
inline int experts_at_once(const Program& program, const Dims& dims, int experts) {
  int64_t largest = 0;
  for (const auto& merge : program.merges) largest = std::max(largest, dims.elements(layout_of(merge.result)));
  if (largest == 0) return experts;
  return static_cast<int>(std::clamp<int64_t>(dims.weight_elements() / largest, 1, experts));
}

inline Blocks given_blocks(const LinearInputs& p) {
  const auto block = [&](const char* name, const void* data, bool shared) {
    const Axes axes = layout_of(name);
    return named(data, axes, p.dims, shared ? 0 : p.dims.elements(axes));
  };
  return {{"L", block("L", p.left, false)}, {"C", block("C", p.central, true)}, {"R", block("R", p.right, false)}};
}
inline Named x_rows(const LinearInputs& p, const void* data) { return rows_of(data, {kIL, kIC, kIR}, p.dims, p.dims.in_features); }
inline Named y_rows(const LinearInputs& p, const void* data) { return rows_of(data, {kJL, kJC, kJR}, p.dims, p.dims.out_features); }

inline Context context_of(const LinearInputs& p, Workspace& workspace, cudaStream_t stream) {
  Context context;
  context.dtype = p.dtype;
  context.dims = p.dims;
  context.tf32 = p.tf32;
  context.offsets = p.offsets;
  context.experts = p.experts;
  context.slots = p.slots;
  context.stream = stream;
  context.workspace = &workspace;
  return context;
}

// Axes of the rows after they met a block: what they keep, then what is new.
inline Axes axes_after(const Named& rows, const Named& block) {
  Axes after;
  for (const Axis axis : rows.axes()) {
    if (!block.has(axis)) after.push_back(axis);
  }
  for (const Axis axis : block.axes()) {
    if (!rows.has(axis)) after.push_back(axis);
  }
  return after;
}

// reads_w: whether anything reads the whole weight, or only its memory is needed.
inline Blocks build(const Context& context, const Blocks& blocks, const Program& program, bool reads_w = true) {
  Blocks built;
  for (const auto& [name, block] : blocks) built[name] = of_experts(block, context.first, context.dtype);
  for (const auto& merge : program.merges) {
    const Named out = context.scratch(layout_of(merge.result), context.count);
    if (merge.result != "W" || reads_w) merge_blocks(context, built.at(merge.first), built.at(merge.second), out, false);
    built[merge.result] = out;
  }
  return built;
}

template <class F>
void for_chunks(Context& context, const Program& program, F&& work) {
  const int size = experts_at_once(program, context.dims, context.experts);
  for (context.first = 0; context.first < context.experts; context.first += size) {
    context.count = std::min(size, context.experts - context.first);
    const Workspace::Scope scope(*context.workspace);
    work(context.first + context.count == context.experts);
  }
}

inline PanelProduct panels_of(const LinearInputs& p, const PanelShape& shape) {
  PanelProduct product;
  product.dtype = p.dtype;
  product.dims = p.dims;
  product.tf32 = p.tf32;
  product.shape = shape;
  product.left = p.left;
  product.central = p.central;
  product.right = p.right;
  product.experts = p.experts;
  product.offsets = p.offsets;
  product.slots = p.slots;
  return product;
}

}  // namespace mpoe::cuda
