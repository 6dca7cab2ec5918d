#include "cpu/linear/chain.h"

namespace mpoe {
namespace {

bool contains(const Axes& axes, Axis axis) {
  return std::find(axes.begin(), axes.end(), axis) != axes.end();
}

}  // namespace

std::array<ChainStep, kChainSteps> chain_steps(const BlockDims& dims,
                                               const std::array<Operand, kChainSteps>& order,
                                               int64_t slots,
                                               int64_t few_rows) {
  const AxisValues sizes = axis_sizes(dims);
  std::array<ChainStep, kChainSteps> steps;
  Axes state = {kInLeft, kInCentral, kInRight};
  for (int s = 0; s < kChainSteps; ++s) {
    ChainStep& step = steps[s];
    step.operand = order[s];
    const Axes axes = natural(order[s]).columns;
    for (const Axis axis : state)
      (contains(axes, axis) ? step.met : step.rest).push_back(axis);
    for (const Axis axis : axes)
      if (!contains(state, axis))
        step.fresh.push_back(axis);
    step.m = product(sizes, step.rest);
    step.k = product(sizes, step.met);
    step.n = product(sizes, step.fresh);
    // The axes that the next operand contracts come last, so the product is copied in long runs; of
    // few rows, central as the first operand keeps its order instead.
    const bool few = step.operand == Operand::kCentral && s == 0 && slots * step.m <= few_rows;
    if (s + 1 < kChainSteps && !few)
      std::stable_partition(
          step.fresh.begin(), step.fresh.end(), [next = natural(order[s + 1]).columns](Axis axis) {
            return !contains(next, axis);
          });
    // Either the state's rows or the operand can keep its order: central does, if it is the larger
    // one.
    if (step.operand == Operand::kCentral && slots * step.m < step.n) {
      const Axes state_order = std::move(step.met);
      for (const Axis axis : axes)
        if (contains(state_order, axis))
          step.met.push_back(axis);
    }
    state = step.rest + step.fresh;
  }
  return steps;
}

AxisMatrix natural(Operand operand) {
  switch (operand) {
    case Operand::kLeft: return {{}, {kInLeft, kOutLeft, kBondLeft}, 0};
    case Operand::kCentral: return {{}, {kBondLeft, kInCentral, kOutCentral, kBondRight}, 0};
    case Operand::kRight: break;
  }
  return {{}, {kBondRight, kInRight, kOutRight}, 0};
}

namespace {

// y of a block from the float product of its last step, permuted to the order of y.
template <class T>
void finish_rows(const GemmKernels& gemm,
                 const LinearForward& in,
                 Span block,
                 const float* rows,
                 const float* bias) {
  const int64_t width = in.dims.out_features, whole = width / kPanel, tail = width % kPanel;
  std::vector<int64_t> offset(whole);
  for (int64_t p = 0; p < whole; ++p)
    offset[p] = p * kPanel;
  for (int64_t s = block.first; s < block.last; ++s, rows += in.dims.padded_out()) {
    T* y = static_cast<T*>(in.y) + s * width;
    T* saved = in.saved == nullptr ? nullptr : static_cast<T*>(in.saved) + s * width;
    Finish finish{
        .bias = bias, .activation = in.activation, .saved = saved, .bias_offset = offset.data()};
    // A row of y is handled as a tile: each panel of 32 columns is a row of the tile.
    gemm.finish(rows, whole, y, offset.data(), 0, consecutive(0, kPanel), finish);
    if (tail == 0)
      continue;
    finish.bias = bias == nullptr ? nullptr : bias + whole * kPanel;
    finish.bias_offset = nullptr;
    if (saved != nullptr)
      finish.saved = saved + whole * kPanel;
    gemm.finish(
        rows + whole * kPanel, 1, y + whole * kPanel, nullptr, 0, consecutive(0, tail), finish);
  }
}

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const int64_t filled = in.filled(), width = in.dims.padded_out();
  if (!zero_the_rest<T>(in))
    return;
  const Chain<T> chain(gemm, in, Direction::kForward, kFewRows);
  constexpr int last = kChainSteps - 1;
  const Permutation leave(chain.sizes(), chain.step(last).product(), rows_out());
  Buffer<float> bias(in.bias == nullptr ? 0 : width + kPanel);
  if (in.bias != nullptr)
    load_bias<T>(in, 0, width + kPanel, bias.get());
  const int64_t most = chain.packs_by_piece()
                           ? filled
                           : std::min(chain.block_slots(), ceil_divide(filled, num_threads()));
  const auto run_blocks = [&](int64_t begin, int64_t end) {
    ChainMemory<T> memory = chain.memory(most);
    Buffer<float> product(most * width), rows(most * width + kPanel);
    for (int64_t k = begin; k < end; ++k) {
      const Span block = nth_part(filled, most, k);
      chain.compute_states(block, last, memory);
      chain.multiply(
          last, Direction::kForward, block, memory.states[last].get(), memory, product.get());
      leave.run(
          gemm_kernels(Dtype::kFloat32), block.size(), product.get(), width, rows.get(), width);
      finish_rows<T>(gemm, in, block, rows.get(), in.bias == nullptr ? nullptr : bias.get());
    }
  };
  if (chain.packs_by_piece())
    return run_blocks(0, 1);  // all threads take part in its product with C
  parallel_for(ceil_divide(filled, most), 1, run_blocks);
}

}  // namespace

void chain_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) { forward<T>(gemm, in); });
}

}  // namespace mpoe
