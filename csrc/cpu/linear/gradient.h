// Shared by the backward of every strategy: the gradient of the pre-activation and of the bias, and
// the sum of the slots' gradients into rows of x. Results do not depend on the number of threads.
#pragma once

#include "cpu/linear/common.h"

namespace mpoe {

// Elements that a thread takes at least, in steps that only copy or add.
constexpr int64_t kTaskElements = 16 * 1024;

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

// The gradients of the blocks of an expert without slots.
template <class T>
void zero_blocks(const LinearBackward& in, int64_t expert) {
  zero_rows(in.dleft, expert, expert + 1, in.dims.left_size() * sizeof(T));
  zero_rows(in.dright, expert, expert + 1, in.dims.right_size() * sizeof(T));
}

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
    const int64_t width = in.dims.out_features;
    memory_ = Buffer<T>(in.filled() * width);
    const T* saved = static_cast<const T*>(in.saved);
    parallel_for(in.filled(), ceil_divide(kTaskElements, width), [&](int64_t begin, int64_t end) {
      const int64_t start = begin * width;
      gemm.activation_backward(
          in.activation, grad + start, saved + start, memory_.get() + start, (end - begin) * width);
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
  constexpr int64_t kLongestPart = 32;  // slots per partial sum: long sums in one pass round more
  constexpr int64_t kColumns = 512;     // every column is summed from the first slot to the last
  const int64_t width = in.dims.out_features, filled = in.filled();
  parallel_for_each(ceil_divide(width, kColumns), 1, [&](int64_t block) {
    const int64_t first = block * kColumns, count = std::min(kColumns, width - first);
    alignas(64) float sum[kColumns] = {};
    for_each_tile(filled, kLongestPart, [&](int64_t slot, int64_t slots) {
      alignas(64) float part[kColumns] = {};
      for (int64_t s = slot; s < slot + slots; ++s)
        gemm.add_row(dz + s * width + first, part, count);
      for (int64_t c = 0; c < count; ++c)
        sum[c] += part[c];
    });
    gemm.round_row(sum, static_cast<T*>(in.dbias) + first, count);
  });
}

// Groups of slots or experts with `floats` sums of dcentral each, which take at most as much memory
// as two weights. Their number does not depend on the number of threads.
template <class T>
int64_t most_groups(const BlockDims& d, int64_t floats) {
  constexpr int64_t kMostGroups = 8;
  const int64_t weight_bytes = d.padded_in() * d.padded_out() * int64_t{sizeof(T)};
  return std::clamp<int64_t>(2 * weight_bytes / (floats * 4), 1, kMostGroups);
}

// Where a kernel writes the gradients of the slots' rows of x. They go straight to dx unless a row
// has several slots, or an index places the rows of slots that must be together; then they go to
// memory of their own, and `finish` sums them into dx (slot by slot in float32, rounded once). It
// also zeroes the rows that no slot reads.
template <class T>
class RowGradients {
 public:
  // `together`: row(slot + 1) must follow row(slot) in memory.
  explicit RowGradients(const LinearBackward& in, bool together = false)
      : in_(in), width_(in.dims.in_features), dx_(static_cast<T*>(in.dx)) {
    if (in.row_index == nullptr || dx_ == nullptr)
      return;
    const int64_t filled = in.filled();
    readers_.assign(in.tokens + 1, 0);
    for (int64_t s = 0; s < filled; ++s)
      ++readers_[in.row_index[s] + 1];
    const bool alone =
        std::all_of(readers_.begin(), readers_.end(), [](int64_t count) { return count <= 1; });
    if (alone && !together)
      return;
    for (int64_t t = 0; t < in.tokens; ++t)
      readers_[t + 1] += readers_[t];
    by_row_.resize(filled);
    std::vector<int64_t> next(readers_.begin(), readers_.end() - 1);
    for (int64_t s = 0; s < filled; ++s)
      by_row_[next[in.row_index[s]]++] = s;
    slots_ = Buffer<T>(filled * width_);
  }
  // [I] of a filled slot, to be written whole.
  T* row(int64_t slot) {
    return slots_ ? slots_.get() + slot * width_ : dx_ + target(slot) * width_;
  }
  void finish(const GemmKernels& gemm) {
    if (dx_ == nullptr)
      return;
    const int64_t row_bytes = width_ * sizeof(T);
    if (in_.row_index == nullptr)
      return zero_rows(dx_, in_.filled(), in_.tokens, row_bytes);
    if (!slots_) {  // readers_[t + 1] is the number of row t's readers
      for (int64_t t = 0; t < in_.tokens; ++t)
        if (readers_[t + 1] == 0)
          zero_rows(dx_, t, t + 1, row_bytes);
      return;
    }
    parallel_for(in_.tokens, ceil_divide(kTaskElements, width_), [&](int64_t begin, int64_t end) {
      Buffer<float> sum(width_);
      for (int64_t t = begin; t < end; ++t) {
        std::fill_n(sum.get(), width_, 0.0f);
        for (int64_t k = readers_[t]; k < readers_[t + 1]; ++k)
          gemm.add_row(slots_.get() + by_row_[k] * width_, sum.get(), width_);
        gemm.round_row(sum.get(), dx_ + t * width_, width_);
      }
    });
  }

 private:
  int64_t target(int64_t slot) const {
    return in_.row_index == nullptr ? slot : in_.row_index[slot];
  }

  const LinearBackward& in_;
  const int64_t width_;
  T* const dx_;
  std::vector<int64_t> readers_;  // [T + 1]: offsets of a row's slots in `by_row_`
  std::vector<int64_t> by_row_;   // filled slots, sorted by row, then slot
  Buffer<T> slots_;               // [filled, I] unless they go straight to dx
};

}  // namespace mpoe
