#include "cpu/linear/chain.h"

#include <type_traits>

namespace mpoe {
namespace {

// Of the rows before and after a product: they share the L2 cache with the operand.
constexpr std::int64_t kBlockBytes = 512 * 1024;
constexpr std::int64_t kMostSlots = 256;

bool contains(const Axes& axes, Axis axis) { return std::find(axes.begin(), axes.end(), axis) != axes.end(); }

Axes axes_of(Operand operand) { return natural(operand).columns; }

}  // namespace

std::array<ChainStep, kChainSteps> chain_steps(
    const BlockDims& dims, const std::array<Operand, kChainSteps>& order, std::int64_t slots,
    std::int64_t few_rows) {
  const AxisValues sizes = axis_sizes(dims);
  std::array<ChainStep, kChainSteps> steps;
  Axes state = {kInLeft, kInCentral, kInRight};
  for (int s = 0; s < kChainSteps; ++s) {
    ChainStep& step = steps[s];
    step.operand = order[s];
    const Axes axes = axes_of(order[s]);
    for (const Axis axis : state) (contains(axes, axis) ? step.met : step.rest).push_back(axis);
    for (const Axis axis : axes)
      if (!contains(state, axis)) step.fresh.push_back(axis);
    step.m = product(sizes, step.rest);
    step.k = product(sizes, step.met);
    step.n = product(sizes, step.fresh);
    // The axes that the next operand contracts come last, so the product is copied in long runs; of few rows, central
    // as the first operand keeps its order instead.
    const bool few = step.operand == Operand::kCentral && s == 0 && slots * step.m <= few_rows;
    if (s + 1 < kChainSteps && !few)
      std::stable_partition(step.fresh.begin(), step.fresh.end(), [next = axes_of(order[s + 1])](Axis axis) {
        return !contains(next, axis);
      });
    // Either the state's rows or the operand can keep its order: central does, if it is the larger one.
    if (step.operand == Operand::kCentral && slots * step.m < step.n) {
      const Axes state_order = std::move(step.met);
      for (const Axis axis : axes)
        if (contains(state_order, axis)) step.met.push_back(axis);
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

template <class T>
Chain<T>::Chain(const GemmKernels& gemm, const LinearInputs& in, Direction last, std::int64_t few_rows)
    : gemm_(gemm), in_(in), sizes_(axis_sizes(in.dims)),
      steps_(chain_steps(in.dims, in.order.chain, in.filled(), few_rows)) {
  for (int s = 0; s < kChainSteps; ++s) {
    const ChainStep& step = steps_[s];
    operands_[s] = Permutation(sizes_, natural(step.operand), {step.met, step.fresh, step.n});
    enter_[s] = Permutation(sizes_, s == 0 ? rows_in() : steps_[s - 1].product(), state(s));
    if (step.operand != Operand::kCentral) continue;
    segment_ = in.dims.jC * in.dims.b;
    segment_step_ = in.dims.iC * segment_;
    const bool one = operands_[s].is_identity();
    const bool in_segments = step.met == Axes{kInCentral} &&
                             step.fresh == Axes{kBondLeft, kOutCentral, kBondRight} && segment_ % kPanel == 0;
    if (one) segment_ = step.n;
    packs_by_piece_ = (one || in_segments) && in.filled() > 0 && in.filled() * step.m <= few_rows;
    if (!packs_by_piece_) pack_central(s, last);
  }
}

template <class T>
void Chain<T>::pack_central(int s, Direction last) {
  const ChainStep& step = steps_[s];
  const T* matrix = static_cast<const T*>(in_.central);
  Buffer<T> arranged;
  if (!operands_[s].is_identity()) {
    arranged = Buffer<T>(step.k * step.n);
    operands_[s].run_by_all(gemm_, matrix, arranged.get());
    matrix = arranged.get();
  }
  for (const Direction direction : {Direction::kForward, Direction::kBackward}) {
    if (direction > last) break;
    Buffer<T>& panels = central_[static_cast<int>(direction)];
    panels = Buffer<T>(round_up(step.k, kPanel) * round_up(step.n, kPanel));
    const bool forward = direction == Direction::kForward;
    const std::int64_t columns = forward ? step.n : step.k, k = padded_k(gemm_, forward ? step.k : step.n);
    parallel_for(0, ceil_divide(columns, kPanel), 1, [&](std::int64_t begin, std::int64_t end) {
      pack_panels(
          s, direction, matrix, begin * kPanel, std::min(end * kPanel, columns), panels.get() + begin * kPanel * k);
    });
  }
}

template <class T>
std::int64_t Chain<T>::block_slots() const {
  std::int64_t elements = 0;
  for (int s = 0; s < kChainSteps; ++s)
    elements = std::max(elements, steps_[s].m * (state(s).row_stride + gradient(s).row_stride));
  return std::clamp<std::int64_t>(kBlockBytes / (elements * static_cast<std::int64_t>(sizeof(T))), 1, kMostSlots);
}

template <class T>
ChainMemory<T> Chain<T>::memory(std::int64_t slots) const {
  ChainMemory<T> memory;
  std::int64_t product = in_.dims.padded_in(), matrix = 0, panels = 0;
  for (int s = 0; s < kChainSteps; ++s) {
    const ChainStep& step = steps_[s];
    memory.states[s] = zeros<T>(slots * step.m * state(s).row_stride);  // rows may end in a partial unit
    product = std::max(product, step.m * std::max(step.k, step.n));
    matrix = std::max(matrix, step.k * step.n);
    panels = std::max(panels, round_up(step.k, kPanel) * round_up(step.n, kPanel));
  }
  memory.product = Buffer<T>(slots * product);
  memory.matrix = Buffer<T>(matrix);
  memory.panels = Buffer<T>(panels);
  return memory;
}

template <class T>
void Chain<T>::compute_states(Span block, int last, ChainMemory<T>& memory) const {
  const BlockDims& d = in_.dims;
  const std::int64_t count = block.last - block.first;
  T* product = memory.product.get();
  pad_rows<T>(
      count, d.in_features, d.padded_in(), [&](std::int64_t k) { return row_of<T>(in_, block.first + k); }, product);
  std::int64_t width = d.padded_in();
  for (int s = 0; s <= last; ++s) {
    T* state_rows = memory.states[s].get();
    enter_[s].run(gemm_, count, product, width, state_rows, steps_[s].m * state(s).row_stride);
    if (s < last) multiply(s, Direction::kForward, block, state_rows, memory, product);
    width = steps_[s].m * steps_[s].n;
  }
}

template <class T>
template <class Out>
void Chain<T>::multiply(
    int s, Direction direction, Span block, const T* a, ChainMemory<T>& memory, Out* out) const {
  const ChainStep& step = steps_[s];
  const bool forward = direction == Direction::kForward;
  const std::int64_t k = forward ? step.k : step.n, columns = forward ? step.n : step.k;
  const std::int64_t units = ceil_divide(k, gemm_.unit), stride = row_stride(gemm_, k);
  const auto store = gemm_kernels(std::is_same_v<Out, float> ? Dtype::kFloat32 : in_.dtype).store;
  // `panels`: of the columns `part`.
  const auto product = [&](Span slots, Span part, const T* panels) {
    alignas(64) float tile[kMaxRows * kPanel];
    const std::int64_t start = (slots.first - block.first) * step.m;
    for (std::int64_t c = part.first; c < part.last; c += kPanel, panels += kPanel * units * gemm_.unit)
      for_each_tile((slots.last - slots.first) * step.m, gemm_.best_rows, [&](std::int64_t first, std::int64_t rows) {
        const std::int64_t row = start + first;
        multiply_rows(gemm_, rows, units, a + row * stride, stride, panels, tile, false);
        store(tile, rows, std::min(kPanel, columns - c), out + row * columns + c, columns);
      });
  };
  if (step.operand == Operand::kCentral && packs_by_piece_) {
    // Columns of a piece: wide where they are read in runs.
    const std::int64_t most = forward && (segment_ == step.n || segment_ % (4 * kPanel) == 0) ? 4 * kPanel : kPanel;
    return parallel_for(0, ceil_divide(columns, most), 1, [&](std::int64_t begin, std::int64_t end) {
      Buffer<T> panels(most * units * gemm_.unit);
      for (std::int64_t piece = begin; piece < end; ++piece) {
        const Span part{piece * most, std::min((piece + 1) * most, columns)};
        pack_piece(step, direction, part, panels.get());
        product(block, part, panels.get());
      }
    });
  }
  if (step.operand == Operand::kCentral)
    return product(block, {0, columns}, central_[static_cast<int>(direction)].get());
  for_each_expert(in_, block, [&](std::int64_t expert, Span slots) {
    pack(s, direction, expert, memory.matrix.get(), memory.panels.get());
    product(slots, {0, columns}, memory.panels.get());
  });
}

template <class T>
void Chain<T>::pack(int s, Direction direction, std::int64_t expert, T* matrix, T* panels) const {
  const ChainStep& step = steps_[s];
  const void* const blocks[] = {in_.left, in_.central, in_.right};
  const T* block = static_cast<const T*>(blocks[static_cast<int>(step.operand)]) + expert * step.k * step.n;
  const bool identity = operands_[s].is_identity();
  if (!identity) operands_[s].run(gemm_, 1, block, 0, matrix, 0);
  pack_panels(
      s, direction, identity ? block : matrix, 0, direction == Direction::kForward ? step.n : step.k, panels);
}

template <class T>
void Chain<T>::pack_panels(
    int s, Direction direction, const T* matrix, std::int64_t first, std::int64_t last, T* panels) const {
  const ChainStep& step = steps_[s];
  const bool forward = direction == Direction::kForward;
  const std::int64_t k = forward ? step.k : step.n, units = ceil_divide(k, gemm_.unit);
  if (forward)
    gemm_.pack(panels, units, matrix + first, step.n, k, last - first);
  else
    gemm_.pack_transposed(panels, units, matrix + first * step.n, step.n, k, last - first);
}

template <class T>
void Chain<T>::pack_piece(const ChainStep& step, Direction direction, Span part, T* panels) const {
  const T* central = static_cast<const T*>(in_.central);
  if (direction == Direction::kForward) {
    const T* first = central + part.first / segment_ * segment_step_ + part.first % segment_;
    return gemm_.pack(panels, ceil_divide(step.k, gemm_.unit), first, segment_, step.k, part.last - part.first);
  }
  const std::int64_t units = ceil_divide(step.n, gemm_.unit);
  for (std::int64_t q = 0; q < step.n / segment_; ++q)
    gemm_.pack_transposed(
        panels + q * segment_ * kPanel, units, central + q * segment_step_ + part.first * segment_, segment_, segment_,
        part.last - part.first);
}

template class Chain<float>;
template class Chain<BFloat16>;
template void Chain<float>::multiply(int, Direction, Span, const float*, ChainMemory<float>&, float*) const;
template void Chain<BFloat16>::multiply(int, Direction, Span, const BFloat16*, ChainMemory<BFloat16>&, float*) const;
template void Chain<BFloat16>::multiply(int, Direction, Span, const BFloat16*, ChainMemory<BFloat16>&, BFloat16*) const;

namespace {

// y of a block from the float product of its last step, permuted to the order of y.
template <class T>
void finish_rows(const GemmKernels& gemm, const LinearForward& in, Span block, const float* rows, const float* bias) {
  const std::int64_t width = in.dims.out_features, whole = width / kPanel, tail = width % kPanel;
  std::vector<std::int64_t> offset(whole);
  for (std::int64_t p = 0; p < whole; ++p) offset[p] = p * kPanel;
  for (std::int64_t s = block.first; s < block.last; ++s, rows += in.dims.padded_out()) {
    T* y = static_cast<T*>(in.y) + s * width;
    T* saved = in.saved == nullptr ? nullptr : static_cast<T*>(in.saved) + s * width;
    Finish finish{.bias = bias, .activation = in.activation, .saved = saved, .bias_offset = offset.data()};
    // A row of y is handled as a tile: each panel of 32 columns is a row of the tile.
    gemm.finish(rows, whole, y, offset.data(), 0, consecutive(0, kPanel), finish);
    if (tail == 0) continue;
    finish.bias = bias == nullptr ? nullptr : bias + whole * kPanel;
    finish.bias_offset = nullptr;
    if (saved != nullptr) finish.saved = saved + whole * kPanel;
    gemm.finish(rows + whole * kPanel, 1, y + whole * kPanel, nullptr, 0, consecutive(0, tail), finish);
  }
}

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const BlockDims& d = in.dims;
  const std::int64_t filled = in.filled(), width = d.padded_out();
  zero_rows(in.y, filled, in.slots, d.out_features * sizeof(T));
  zero_rows(in.saved, filled, in.slots, d.out_features * sizeof(T));
  if (filled == 0) return;
  const Chain<T> chain(gemm, in, Direction::kForward, kFewRows);
  constexpr int last = kChainSteps - 1;
  const Permutation leave(chain.sizes(), chain.step(last).product(), rows_out());
  Buffer<float> bias(in.bias == nullptr ? 0 : width + kPanel);
  if (in.bias != nullptr) load_bias<T>(in, 0, width + kPanel, bias.get());
  const std::int64_t most =
      chain.packs_by_piece() ? filled : std::min(chain.block_slots(), ceil_divide(filled, num_threads()));
  const auto run_blocks = [&](std::int64_t begin, std::int64_t end) {
    ChainMemory<T> memory = chain.memory(most);
    Buffer<float> product(most * width), rows(most * width + kPanel);
    for (std::int64_t k = begin; k < end; ++k) {
      const Span block{k * most, std::min(filled, (k + 1) * most)};
      chain.compute_states(block, last, memory);
      chain.multiply(last, Direction::kForward, block, memory.states[last].get(), memory, product.get());
      leave.run(gemm_kernels(Dtype::kFloat32), block.last - block.first, product.get(), width, rows.get(), width);
      finish_rows<T>(gemm, in, block, rows.get(), in.bias == nullptr ? nullptr : bias.get());
    }
  };
  if (chain.packs_by_piece()) return run_blocks(0, 1);  // all threads take part in its product with C
  parallel_for(0, ceil_divide(filled, most), 1, run_blocks);
}

}  // namespace

void chain_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&](const GemmKernels& gemm, auto element) {
    forward<decltype(element)>(gemm, in);
  });
}

}  // namespace mpoe
