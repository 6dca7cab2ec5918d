// The strategy chain: rows are multiplied by L, C and R in turn, in the given order. A slot's
// intermediate row is its state, a tensor with some of the axes; an operand contracts the axes that
// it shares with the state (`met`) and puts its others (`fresh`) after the remaining ones (`rest`):
//   product[(slots rest), fresh] = state[(slots rest), met] operand[met, fresh]
// Slots are processed in blocks whose states stay in cache. Within a block, L and R take one
// product per expert, and C takes one for all.
#pragma once

#include <type_traits>

#include "cpu/linear/axes.h"
#include "cpu/linear/rebuild.h"

namespace mpoe {

// Forward: products with operands [met, fresh]. Backward: with their transposes, which turn the
// gradient of a product into that of the preceding state.
enum class Direction { kForward, kBackward };

struct ChainStep {
  Operand operand;
  Axes rest, met, fresh;
  int64_t m, k, n;  // their numbers of elements

  AxisMatrix product() const { return {rest, fresh, n}; }
  // Of products with the operand in a direction.
  int64_t inner(Direction direction) const { return direction == Direction::kForward ? k : n; }
  int64_t columns(Direction direction) const { return direction == Direction::kForward ? n : k; }
};

constexpr int kChainSteps = 3;
// For which a product with C packs it piece by piece. More in a backward, where the gradient of C
// otherwise takes sums in float32 of all of C with every block; whether it is needed must not
// change the other gradients' bits.
constexpr int64_t kFewRows = 64, kFewGradientRows = 128;

std::array<ChainStep, kChainSteps> chain_steps(const BlockDims& dims,
                                               const std::array<Operand, kChainSteps>& order,
                                               int64_t slots,
                                               int64_t few_rows);

// An operand in memory order: the axes of L, C or R.
AxisMatrix natural(Operand operand);

// Rows of x and of y.
inline AxisMatrix rows_in() {
  return {{}, {kInLeft, kInCentral, kInRight}, 0};
}
inline AxisMatrix rows_out() {
  return {{}, {kOutLeft, kOutCentral, kOutRight}, 0};
}

// Copies `count` rows of `width` elements, padded with zeros to `whole`. in(k) points to row k.
template <class T, class Source>
void pad_rows(int64_t count, int64_t width, int64_t whole, const Source& in, T* out) {
  for (int64_t k = 0; k < count; ++k, out += whole) {
    std::memcpy(out, in(k), width * sizeof(T));
    std::fill(out + width, out + whole, T{});
  }
}

// Of the rows before and after a product: they share the L2 cache with the operand.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kMostSlots = 256;

// One thread's scratch memory for a block of slots.
template <class T>
struct ChainMemory {
  std::array<Buffer<T>, kChainSteps> states;  // [(slots rest), met] before every step
  Buffer<T> product;
  Buffer<T> matrix, panels;  // an operand
};

// The steps and their operands.
template <class T>
class Chain {
 public:
  // `last`: the last direction that is needed; backward implies forward.
  Chain(const GemmKernels& gemm, const LinearInputs& in, Direction last, int64_t few_rows)
      : gemm_(gemm),
        in_(in),
        sizes_(axis_sizes(in.dims)),
        steps_(chain_steps(in.dims, in.order.chain, in.filled(), few_rows)) {
    for (int s = 0; s < kChainSteps; ++s) {
      const ChainStep& step = steps_[s];
      operands_[s] = Permutation(sizes_, natural(step.operand), {step.met, step.fresh, step.n});
      enter_[s] = Permutation(sizes_, s == 0 ? rows_in() : steps_[s - 1].product(), state(s));
      if (step.operand != Operand::kCentral)
        continue;
      segment_ = in.dims.jC * in.dims.b;
      segment_step_ = in.dims.iC * segment_;
      const bool one = operands_[s].is_identity();
      const bool in_segments = step.met == Axes{kInCentral} &&
                               step.fresh == Axes{kBondLeft, kOutCentral, kBondRight} &&
                               segment_ % kPanel == 0;
      if (one)
        segment_ = step.n;
      packs_by_piece_ = (one || in_segments) && in.filled() > 0 && in.filled() * step.m <= few_rows;
      if (!packs_by_piece_)
        pack_central(s, last);
    }
  }

  const ChainStep& step(int s) const { return steps_[s]; }
  const AxisValues& sizes() const { return sizes_; }
  // A state, and the gradient of a product, with the row stride that the product reading them
  // needs.
  AxisMatrix state(int s) const {
    return {steps_[s].rest, steps_[s].met, row_stride(gemm_, steps_[s].k)};
  }
  AxisMatrix gradient(int s) const {
    return {steps_[s].rest, steps_[s].fresh, row_stride(gemm_, steps_[s].n)};
  }
  // As many slots as keep everything that a block touches in cache.
  int64_t block_slots() const {
    int64_t elements = 0;
    for (int s = 0; s < kChainSteps; ++s)
      elements = std::max(elements, steps_[s].m * (state(s).row_stride + gradient(s).row_stride));
    return std::clamp<int64_t>(kBlockBytes / (elements * int64_t{sizeof(T)}), 1, kMostSlots);
  }
  // Whether C is in order, and all slots are one block of so few rows that its panels are packed
  // piece by piece as they are needed: a piece stays in cache, and all panels together would pass
  // through memory. C, and its gradient, are then matrices [met, `segment`] for each `segment` of
  // the columns, `segment_step` elements apart: one, after L; one for each a, if C is first.
  bool packs_by_piece() const { return packs_by_piece_; }
  int64_t segment() const { return segment_; }
  int64_t segment_step() const { return segment_step_; }

  ChainMemory<T> memory(int64_t slots) const {
    ChainMemory<T> memory;
    int64_t product = in_.dims.padded_in(), matrix = 0, panels = 0;
    for (int s = 0; s < kChainSteps; ++s) {
      const ChainStep& step = steps_[s];
      // Rows may end in a partial unit
      memory.states[s] = zeros<T>(slots * step.m * state(s).row_stride);
      product = std::max(product, step.m * std::max(step.k, step.n));
      matrix = std::max(matrix, step.k * step.n);
      panels = std::max(panels, round_up(step.k, kPanel) * round_up(step.n, kPanel));
    }
    memory.product = Buffer<T>(slots * product);
    memory.matrix = Buffer<T>(matrix);
    memory.panels = Buffer<T>(panels);
    return memory;
  }
  // Computes the states of the slots of `block` before the steps 0..last.
  void compute_states(Span block, int last, ChainMemory<T>& memory) const {
    const BlockDims& d = in_.dims;
    const int64_t count = block.size();
    T* product = memory.product.get();
    pad_rows<T>(
        count,
        d.in_features,
        d.padded_in(),
        [&](int64_t k) { return row_of<T>(in_, block.first + k); },
        product);
    int64_t width = d.padded_in();
    for (int s = 0; s <= last; ++s) {
      T* state_rows = memory.states[s].get();
      enter_[s].run(gemm_, count, product, width, state_rows, steps_[s].m * state(s).row_stride);
      if (s < last)
        multiply(s, Direction::kForward, block, state_rows, memory, product);
      width = steps_[s].m * steps_[s].n;
    }
  }
  // Rows `a` of the slots of `block`, a state or a gradient, times the operand of a step: [(slots
  // m), its columns].
  template <class Out>
  void multiply(
      int s, Direction direction, Span block, const T* a, ChainMemory<T>& memory, Out* out) const {
    const ChainStep& step = steps_[s];
    const int64_t k = step.inner(direction), columns = step.columns(direction);
    const int64_t units = ceil_divide(k, gemm_.unit), stride = row_stride(gemm_, k);
    const auto store = gemm_kernels(std::is_same_v<Out, float> ? Dtype::kFloat32 : in_.dtype).store;
    // `panels`: of the columns `part`.
    const auto product = [&](Span slots, Span part, const T* panels) {
      alignas(64) float tile[kMaxRows * kPanel];
      const int64_t start = (slots.first - block.first) * step.m;
      for (int64_t c = part.first; c < part.last;
           c += kPanel, panels += kPanel * units * gemm_.unit)
        for_each_tile(slots.size() * step.m, gemm_.best_rows, [&](int64_t first, int64_t rows) {
          const int64_t row = start + first;
          multiply_rows_any_length(
              gemm_, rows, units, a + row * stride, stride, panels, tile, false);
          store(tile, rows, std::min(kPanel, columns - c), out + row * columns + c, columns);
        });
    };
    if (step.operand == Operand::kCentral && packs_by_piece_) {
      // Columns of a piece: wide where they are read in runs.
      const bool forward = direction == Direction::kForward;
      const int64_t most =
          forward && (segment_ == step.n || segment_ % (4 * kPanel) == 0) ? 4 * kPanel : kPanel;
      return parallel_for(ceil_divide(columns, most), 1, [&](int64_t begin, int64_t end) {
        Buffer<T> panels(most * units * gemm_.unit);
        for (int64_t piece = begin; piece < end; ++piece) {
          const Span part = nth_part(columns, most, piece);
          pack_piece(step, direction, part, panels.get());
          product(block, part, panels.get());
        }
      });
    }
    if (step.operand == Operand::kCentral)
      return product(block, {0, columns}, central_[static_cast<int>(direction)].get());
    for_each_expert(in_, block, [&](int64_t expert, Span slots) {
      pack(s, direction, expert, memory.matrix.get(), memory.panels.get());
      product(slots, {0, columns}, memory.panels.get());
    });
  }

 private:
  // The panels of C in every direction up to `last`, by all threads.
  void pack_central(int s, Direction last) {
    const ChainStep& step = steps_[s];
    const T* matrix = static_cast<const T*>(in_.central);
    Buffer<T> arranged;
    if (!operands_[s].is_identity()) {
      arranged = Buffer<T>(step.k * step.n);
      operands_[s].run_by_all(gemm_, matrix, arranged.get());
      matrix = arranged.get();
    }
    for (const Direction direction : {Direction::kForward, Direction::kBackward}) {
      if (direction > last)
        break;
      Buffer<T>& panels = central_[static_cast<int>(direction)];
      panels = Buffer<T>(round_up(step.k, kPanel) * round_up(step.n, kPanel));
      const int64_t columns = step.columns(direction), k = padded_k(gemm_, step.inner(direction));
      parallel_for(ceil_divide(columns, kPanel), 1, [&](int64_t begin, int64_t end) {
        pack_panels(s,
                    direction,
                    matrix,
                    begin * kPanel,
                    std::min(end * kPanel, columns),
                    panels.get() + begin * kPanel * k);
      });
    }
  }
  // The panels of a part of the columns of C, which is read in place.
  void pack_piece(const ChainStep& step, Direction direction, Span part, T* panels) const {
    const T* central = static_cast<const T*>(in_.central);
    if (direction == Direction::kForward) {
      const T* first = central + part.first / segment_ * segment_step_ + part.first % segment_;
      return gemm_.pack(
          panels, ceil_divide(step.k, gemm_.unit), first, segment_, step.k, part.size());
    }
    const int64_t units = ceil_divide(step.n, gemm_.unit);
    for (int64_t q = 0; q < step.n / segment_; ++q)
      gemm_.pack_transposed(panels + q * segment_ * kPanel,
                            units,
                            central + q * segment_step_ + part.first * segment_,
                            segment_,
                            segment_,
                            part.size());
  }
  // The panels of an expert's L or R; `matrix` is scratch memory for [met, fresh].
  void pack(int s, Direction direction, int64_t expert, T* matrix, T* panels) const {
    const ChainStep& step = steps_[s];
    const void* const blocks[] = {in_.left, in_.central, in_.right};
    const T* block =
        static_cast<const T*>(blocks[static_cast<int>(step.operand)]) + expert * step.k * step.n;
    const bool identity = operands_[s].is_identity();
    if (!identity)
      operands_[s].run(gemm_, 1, block, 0, matrix, 0);
    pack_panels(s, direction, identity ? block : matrix, 0, step.columns(direction), panels);
  }
  // The panels of the columns [first, last) of an operand [met, fresh].
  void pack_panels(
      int s, Direction direction, const T* matrix, int64_t first, int64_t last, T* panels) const {
    const ChainStep& step = steps_[s];
    const int64_t k = step.inner(direction), units = ceil_divide(k, gemm_.unit);
    if (direction == Direction::kForward)
      gemm_.pack(panels, units, matrix + first, step.n, k, last - first);
    else
      gemm_.pack_transposed(panels, units, matrix + first * step.n, step.n, k, last - first);
  }

  const GemmKernels& gemm_;
  const LinearInputs& in_;
  const AxisValues sizes_;
  const std::array<ChainStep, kChainSteps> steps_;
  std::array<Permutation, kChainSteps> operands_;  // a block to [met, fresh]
  std::array<Permutation, kChainSteps> enter_;     // x, or the preceding product, to the state
  Buffer<T> central_[2];                           // panels by direction
  bool packs_by_piece_ = false;
  int64_t segment_ = 0, segment_step_ = 0;
};

}  // namespace mpoe
