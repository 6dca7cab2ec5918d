#include "cpu/linear/gradient.h"

namespace mpoe {

template <class T>
PreActivationGradient<T>::PreActivationGradient(const GemmKernels& gemm, const LinearBackward& in) {
  const T* grad = static_cast<const T*>(in.grad);
  values_ = grad;
  if (in.activation == Activation::kNone) return;
  const std::int64_t width = in.dims.out_features;
  memory_ = Buffer<T>(in.filled() * width);
  const T* saved = static_cast<const T*>(in.saved);
  parallel_for(0, in.filled(), ceil_divide(16 * 1024, width), [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t start = begin * width;
    gemm.activation_backward(
        in.activation, grad + start, saved + start, memory_.get() + start, (end - begin) * width);
  });
  values_ = memory_.get();
}

template <class T>
void bias_gradient(const GemmKernels& gemm, const LinearBackward& in, const T* dz) {
  if (in.dbias == nullptr) return;
  constexpr std::int64_t kLongestPart = 32;  // slots per partial sum: long sums in one pass round more
  constexpr std::int64_t kColumns = 512;  // every column is summed from the first slot to the last
  const std::int64_t width = in.dims.out_features, filled = in.filled();
  parallel_for(0, ceil_divide(width, kColumns), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin * kColumns; first < std::min(end * kColumns, width); first += kColumns) {
      const std::int64_t count = std::min(kColumns, width - first);
      alignas(64) float sum[kColumns] = {};
      for_each_tile(filled, kLongestPart, [&](std::int64_t slot, std::int64_t slots) {
        alignas(64) float part[kColumns] = {};
        for (std::int64_t s = slot; s < slot + slots; ++s) gemm.add_row(dz + s * width + first, part, count);
        for (std::int64_t c = 0; c < count; ++c) sum[c] += part[c];
      });
      gemm.round_row(sum, static_cast<T*>(in.dbias) + first, count);
    }
  });
}

template <class T>
RowGradients<T>::RowGradients(const LinearBackward& in, bool together)
    : in_(in), width_(in.dims.in_features), dx_(static_cast<T*>(in.dx)) {
  if (in.row_index == nullptr || dx_ == nullptr) return;
  const std::int64_t filled = in.filled();
  readers_.assign(in.tokens + 1, 0);
  for (std::int64_t s = 0; s < filled; ++s) ++readers_[in.row_index[s] + 1];
  const bool alone = std::all_of(readers_.begin(), readers_.end(), [](std::int64_t count) { return count <= 1; });
  if (alone && !together) return;
  for (std::int64_t t = 0; t < in.tokens; ++t) readers_[t + 1] += readers_[t];
  by_row_.resize(filled);
  std::vector<std::int64_t> next(readers_.begin(), readers_.end() - 1);
  for (std::int64_t s = 0; s < filled; ++s) by_row_[next[in.row_index[s]]++] = s;
  slots_ = Buffer<T>(filled * width_);
}

template <class T>
void RowGradients<T>::finish(const GemmKernels& gemm) {
  if (dx_ == nullptr) return;
  const std::int64_t row_bytes = width_ * sizeof(T);
  if (in_.row_index == nullptr) return zero_rows(dx_, in_.filled(), in_.tokens, row_bytes);
  if (!slots_) {  // readers_[t + 1] is the number of row t's readers
    for (std::int64_t t = 0; t < in_.tokens; ++t)
      if (readers_[t + 1] == 0) zero_rows(dx_, t, t + 1, row_bytes);
    return;
  }
  parallel_for(0, in_.tokens, ceil_divide(16 * 1024, width_), [&](std::int64_t begin, std::int64_t end) {
    Buffer<float> sum(width_);
    for (std::int64_t t = begin; t < end; ++t) {
      std::fill_n(sum.get(), width_, 0.0f);
      for (std::int64_t k = readers_[t]; k < readers_[t + 1]; ++k)
        gemm.add_row(slots_.get() + by_row_[k] * width_, sum.get(), width_);
      gemm.round_row(sum.get(), dx_ + t * width_, width_);
    }
  });
}

template class PreActivationGradient<float>;
template class PreActivationGradient<BFloat16>;
template class RowGradients<float>;
template class RowGradients<BFloat16>;
template void bias_gradient<float>(const GemmKernels&, const LinearBackward&, const float*);
template void bias_gradient<BFloat16>(const GemmKernels&, const LinearBackward&, const BFloat16*);

}  // namespace mpoe
