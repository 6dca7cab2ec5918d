// Shared by the backward of every strategy: the gradient of the pre-activation and of the bias, and
// the sum of the slots' gradients into rows of x. Results do not depend on the number of threads.
#pragma once

#include "cpu/linear/common.h"

namespace mpoe {

// Which gradients other than the bias's are needed.
struct Wanted {
  bool x, left, central, right;
  explicit Wanted(const LinearBackward& in)
      : x(in.dx != nullptr),
        left(in.dleft != nullptr),
        central(in.dcentral != nullptr),
        right(in.dright != nullptr) {}
  bool weight() const { return left || central || right; }
  bool half() const { return left || central; }
};

// dz = grad * activation'(saved) of the filled slots, [filled, F]: `grad` itself without an
// activation, otherwise computed into its own memory.
template <class T>
class PreActivationGradient {
 public:
  PreActivationGradient(const GemmKernels& gemm, const LinearBackward& in) {
    const T* grad = static_cast<const T*>(in.grad);
    values_ = grad;
    if (in.activation == Activation::kNone)
      return;
    const std::int64_t width = in.dims.out_features;
    memory_ = Buffer<T>(in.filled() * width);
    const T* saved = static_cast<const T*>(in.saved);
    parallel_for(
        0, in.filled(), ceil_divide(16 * 1024, width), [&](std::int64_t begin, std::int64_t end) {
          const std::int64_t start = begin * width;
          gemm.activation_backward(in.activation,
                                   grad + start,
                                   saved + start,
                                   memory_.get() + start,
                                   (end - begin) * width);
        });
    values_ = memory_.get();
  }
  const T* get() const { return values_; }

 private:
  Buffer<T> memory_;
  const T* values_;
};

// dbias = sum over the filled slots of dz, if it is wanted.
template <class T>
void bias_gradient(const GemmKernels& gemm, const LinearBackward& in, const T* dz) {
  if (in.dbias == nullptr)
    return;
  constexpr std::int64_t kLongestPart =
      32;                                 // slots per partial sum: long sums in one pass round more
  constexpr std::int64_t kColumns = 512;  // every column is summed from the first slot to the last
  const std::int64_t width = in.dims.out_features, filled = in.filled();
  parallel_for(0, ceil_divide(width, kColumns), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kColumns; first < std::min(end * kColumns, width);
         first += kColumns) {
      const std::int64_t count = std::min(kColumns, width - first);
      alignas(64) float sum[kColumns] = {};
      for_each_tile(filled, kLongestPart, [&](std::int64_t slot, std::int64_t slots) {
        alignas(64) float part[kColumns] = {};
        for (std::int64_t s = slot; s < slot + slots; ++s)
          gemm.add_row(dz + s * width + first, part, count);
        for (std::int64_t c = 0; c < count; ++c)
          sum[c] += part[c];
      });
      gemm.round_row(sum, static_cast<T*>(in.dbias) + first, count);
    }
  });
}

// Where a kernel writes the gradients of the slots' rows of x: straight to dx if every row has at
// most one slot. Otherwise `finish` sums them (slot by slot in float32, rounded once). It also
// zeroes the rows that no slot reads.
template <class T>
class RowGradients {
 public:
  // `together`: row(slot + 1) must follow row(slot) in memory.
  explicit RowGradients(const LinearBackward& in, bool together = false)
      : in_(in), width_(in.dims.in_features), dx_(static_cast<T*>(in.dx)) {
    if (in.row_index == nullptr || dx_ == nullptr)
      return;
    const std::int64_t filled = in.filled();
    readers_.assign(in.tokens + 1, 0);
    for (std::int64_t s = 0; s < filled; ++s)
      ++readers_[in.row_index[s] + 1];
    const bool alone = std::all_of(
        readers_.begin(), readers_.end(), [](std::int64_t count) { return count <= 1; });
    if (alone && !together)
      return;
    for (std::int64_t t = 0; t < in.tokens; ++t)
      readers_[t + 1] += readers_[t];
    by_row_.resize(filled);
    std::vector<std::int64_t> next(readers_.begin(), readers_.end() - 1);
    for (std::int64_t s = 0; s < filled; ++s)
      by_row_[next[in.row_index[s]]++] = s;
    slots_ = Buffer<T>(filled * width_);
  }
  // [I] of a filled slot, to be written whole.
  T* row(std::int64_t slot) {
    return slots_ ? slots_.get() + slot * width_ : dx_ + target(slot) * width_;
  }
  void finish(const GemmKernels& gemm) {
    if (dx_ == nullptr)
      return;
    const std::int64_t row_bytes = width_ * sizeof(T);
    if (in_.row_index == nullptr)
      return zero_rows(dx_, in_.filled(), in_.tokens, row_bytes);
    if (!slots_) {  // readers_[t + 1] is the number of row t's readers
      for (std::int64_t t = 0; t < in_.tokens; ++t)
        if (readers_[t + 1] == 0)
          zero_rows(dx_, t, t + 1, row_bytes);
      return;
    }
    parallel_for(
        0, in_.tokens, ceil_divide(16 * 1024, width_), [&](std::int64_t begin, std::int64_t end) {
          Buffer<float> sum(width_);
          for (std::int64_t t = begin; t < end; ++t) {
            std::fill_n(sum.get(), width_, 0.0f);
            for (std::int64_t k = readers_[t]; k < readers_[t + 1]; ++k)
              gemm.add_row(slots_.get() + by_row_[k] * width_, sum.get(), width_);
            gemm.round_row(sum.get(), dx_ + t * width_, width_);
          }
        });
  }

 private:
  std::int64_t target(std::int64_t slot) const {
    return in_.row_index == nullptr ? slot : in_.row_index[slot];
  }

  const LinearBackward& in_;
  const std::int64_t width_;
  T* const dx_;
  std::vector<std::int64_t> readers_;  // [T + 1]: offsets of a row's slots in `by_row_`
  std::vector<std::int64_t> by_row_;   // filled slots, sorted by row, then slot
  Buffer<T> slots_;                    // [filled, I] if a row has several readers
};

}  // namespace mpoe
