// Shared by the backward of every strategy: the gradient of the pre-activation and of the bias, and the sum of the
// slots' gradients into rows of x. Results do not depend on the number of threads.
#pragma once

#include "cpu/linear/common.h"

namespace mpoe {

// Which gradients other than the bias's are needed.
struct Wanted {
  bool x, left, central, right;
  explicit Wanted(const LinearBackward& in)
      : x(in.dx != nullptr), left(in.dleft != nullptr), central(in.dcentral != nullptr), right(in.dright != nullptr) {}
  bool weight() const { return left || central || right; }
  bool half() const { return left || central; }
};

// dz = grad * activation'(saved) of the filled slots, [filled, F]: `grad` itself without an activation, otherwise
// computed into its own memory.
template <class T>
class PreActivationGradient {
 public:
  PreActivationGradient(const GemmKernels& gemm, const LinearBackward& in);
  const T* get() const { return values_; }

 private:
  Buffer<T> memory_;
  const T* values_;
};

// dbias = sum over the filled slots of dz, if it is wanted.
template <class T>
void bias_gradient(const GemmKernels& gemm, const LinearBackward& in, const T* dz);

// Where a kernel writes the gradients of the slots' rows of x: straight to dx if every row has at most one slot.
// Otherwise `finish` sums them (slot by slot in float32, rounded once). It also zeroes the rows that no slot reads.
template <class T>
class RowGradients {
 public:
  // `together`: row(slot + 1) must follow row(slot) in memory.
  explicit RowGradients(const LinearBackward& in, bool together = false);
  // [I] of a filled slot, to be written whole.
  T* row(std::int64_t slot) { return slots_ ? slots_.get() + slot * width_ : dx_ + target(slot) * width_; }
  void finish(const GemmKernels& gemm);

 private:
  std::int64_t target(std::int64_t slot) const { return in_.row_index == nullptr ? slot : in_.row_index[slot]; }

  const LinearBackward& in_;
  const std::int64_t width_;
  T* const dx_;
  std::vector<std::int64_t> readers_;  // [T + 1]: offsets of a row's slots in `by_row_`
  std::vector<std::int64_t> by_row_;   // filled slots, sorted by row, then slot
  Buffer<T> slots_;                    // [filled, I] if a row has several readers
};

}  // namespace mpoe
