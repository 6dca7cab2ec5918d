// The strategy chain: rows are multiplied by L, C and R in turn, in the given order. A slot's intermediate row is
// its state, a tensor with some of the axes; an operand contracts the axes that it shares with the state (`met`) and
// puts its others (`fresh`) after the remaining ones (`rest`):
//   product[(slots rest), fresh] = state[(slots rest), met] operand[met, fresh]
// Slots are processed in blocks whose states stay in cache. Within a block, L and R take one product per expert, and C
// takes one for all.
#pragma once

#include "cpu/linear/axes.h"
#include "cpu/linear/rebuild.h"

namespace mpoe {

struct ChainStep {
  Operand operand;
  Axes rest, met, fresh;
  std::int64_t m, k, n;  // their numbers of elements

  AxisMatrix product() const { return {rest, fresh, n}; }
};

constexpr int kChainSteps = 3;
// For which a product with C packs it piece by piece. More in a backward, where the gradient of C otherwise takes sums
// in float32 of all of C with every block; whether it is needed must not change the other gradients' bits.
constexpr std::int64_t kFewRows = 64, kFewGradientRows = 128;

std::array<ChainStep, kChainSteps> chain_steps(
    const BlockDims& dims, const std::array<Operand, kChainSteps>& order, std::int64_t slots,
    std::int64_t few_rows);

// An operand in memory order: the axes of L, C or R.
AxisMatrix natural(Operand operand);

// Rows of x and of y.
inline AxisMatrix rows_in() { return {{}, {kInLeft, kInCentral, kInRight}, 0}; }
inline AxisMatrix rows_out() { return {{}, {kOutLeft, kOutCentral, kOutRight}, 0}; }

// Forward: products with operands [met, fresh]. Backward: with their transposes, which turn the gradient of a product
// into that of the preceding state.
enum class Direction { kForward, kBackward };

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
  Chain(const GemmKernels& gemm, const LinearInputs& in, Direction last, std::int64_t few_rows);

  const ChainStep& step(int s) const { return steps_[s]; }
  const AxisValues& sizes() const { return sizes_; }
  // A state, and the gradient of a product, with the row stride that the product reading them needs.
  AxisMatrix state(int s) const { return {steps_[s].rest, steps_[s].met, row_stride(gemm_, steps_[s].k)}; }
  AxisMatrix gradient(int s) const { return {steps_[s].rest, steps_[s].fresh, row_stride(gemm_, steps_[s].n)}; }
  // As many slots as keep everything that a block touches in cache.
  std::int64_t block_slots() const;
  // Whether C is in order, and all slots are one block of so few rows that its panels are packed piece by piece as they
  // are needed: a piece stays in cache, and all panels together would pass through memory. C, and its gradient, are
  // then matrices [met, `segment`] for each `segment` of the columns, `segment_step` elements apart: one, after L; one
  // for each a, if C is first.
  bool packs_by_piece() const { return packs_by_piece_; }
  std::int64_t segment() const { return segment_; }
  std::int64_t segment_step() const { return segment_step_; }

  ChainMemory<T> memory(std::int64_t slots) const;
  // Computes the states of the slots of `block` before the steps 0..last.
  void compute_states(Span block, int last, ChainMemory<T>& memory) const;
  // Rows `a` of the slots of `block`, a state or a gradient, times the operand of a step: [(slots m), its columns].
  template <class Out>
  void multiply(int s, Direction direction, Span block, const T* a, ChainMemory<T>& memory, Out* out) const;

 private:
  // The panels of C in every direction up to `last`, by all threads.
  void pack_central(int s, Direction last);
  // The panels of a part of the columns of C, which is read in place.
  void pack_piece(const ChainStep& step, Direction direction, Span part, T* panels) const;
  // The panels of an expert's L or R; `matrix` is scratch memory for [met, fresh].
  void pack(int s, Direction direction, std::int64_t expert, T* matrix, T* panels) const;
  // The panels of the columns [first, last) of an operand [met, fresh].
  void pack_panels(
      int s, Direction direction, const T* matrix, std::int64_t first, std::int64_t last, T* panels) const;

  const GemmKernels& gemm_;
  const LinearInputs& in_;
  const AxisValues sizes_;
  const std::array<ChainStep, kChainSteps> steps_;
  std::array<Permutation, kChainSteps> operands_;  // a block to [met, fresh]
  std::array<Permutation, kChainSteps> enter_;     // x, or the preceding product, to the state
  Buffer<T> central_[2];                           // panels by direction
  bool packs_by_piece_ = false;
  std::int64_t segment_ = 0, segment_step_ = 0;
};

// Copies `count` rows of `width` elements, padded with zeros to `whole`. in(k) points to row k.
template <class T, class Source>
void pad_rows(std::int64_t count, std::int64_t width, std::int64_t whole, const Source& in, T* out) {
  for (std::int64_t k = 0; k < count; ++k, out += whole) {
    std::memcpy(static_cast<void*>(out), in(k), width * sizeof(T));
    std::fill(out + width, out + whole, T{});
  }
}

}  // namespace mpoe
