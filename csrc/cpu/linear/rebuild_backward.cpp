// Backward of the rebuild strategy, one expert at a time: dx = dz W^T with the slabs of the
// forward, transposed, and for the same blocks dW = x^T dz, projected immediately:
//   dright = LC^T dW,  dLC = dW right^T,  dleft = dLC central^T,  dcentral += left^T dLC.
// Threads split the blocks of iC. Each block has its own columns of dx and dcentral; dleft and
// dright are kept per block and summed in block order, so that the number of threads changes
// nothing.
#include "cpu/linear/rebuild_gradient.h"

namespace mpoe {
namespace {

// out[r] = sum over `blocks` of the panels' rows r of sums [block, panel, height, 32], rounded.
template <class T>
void store_sum(const GemmKernels& gemm,
               const Buffer<float>& sums,
               int64_t blocks,
               int64_t block_size,
               int64_t height,
               int64_t rows,
               int64_t width,
               T* out) {
  parallel_for(rows, ceil_divide(kTaskElements, width * blocks), [&](int64_t begin, int64_t end) {
    std::vector<float> row(round_up(width, kPanel));
    for (int64_t r = begin; r < end; ++r) {
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t c = 0; c < width; c += kPanel) {
          const float* from = sums.get() + block * block_size + (c / kPanel * height + r) * kPanel;
          for (int64_t k = 0; k < kPanel; ++k)
            row[c + k] += from[k];
        }
      gemm.round_row(row.data(), out + r * width, width);
    }
  });
}

template <class T>
void store_central(const GemmKernels& gemm,
                   const LinearBackward& in,
                   const RebuildPlan& plan,
                   const GradientSizes& sizes,
                   const float* sums) {
  const BlockDims& d = in.dims;
  const int64_t stride = d.iC * d.jC * d.b, k_blocks = plan.k_blocks();
  parallel_for_each(plan.n_blocks() * k_blocks, 1, [&](int64_t block) {
    const Span i_range = plan.n_columns(block / k_blocks).central,
               j_range = plan.k_span(block % k_blocks);
    int64_t column = 0;
    for (int64_t i = i_range.first; i < i_range.last; ++i)
      for (int64_t j = j_range.first; j < j_range.last; ++j, column += sizes.b) {
        // Sums are read sequentially, in runs of the columns of one pair in one panel.
        for (int64_t b = 0, run = 0; b < d.b; b += run) {
          const int64_t c = column + b;
          run = std::min(d.b - b, kPanel - c % kPanel);
          const float* from =
              sums + block * sizes.central_sums + c / kPanel * d.a * kPanel + c % kPanel;
          T* out = static_cast<T*>(in.dcentral) + (i * d.jC + j) * d.b + b;
          for (int64_t a = 0; a < d.a; ++a)
            gemm.round_row(from + a * kPanel, out + a * stride, run);
        }
      }
  });
}

template <class T>
class Backward {
 public:
  Backward(const GemmKernels& gemm, const LinearBackward& in)
      : gemm_(gemm),
        in_(in),
        plan_(gemm, in.dims, true, sizeof(T)),
        sizes_(gemm, in.dims, plan_),
        gradients_(in),
        rows_(gemm, in, plan_, sizes_, in.most_slots()) {
    const int64_t blocks = plan_.n_blocks();
    if (rows_.wanted.left)
      sums_.left = Buffer<float>(blocks * sizes_.left_sums);
    if (rows_.wanted.right)
      sums_.right = Buffer<float>(blocks * sizes_.right_sums);
    if (rows_.wanted.central)
      sums_.central = zeros<float>(blocks * plan_.k_blocks() * sizes_.central_sums);
  }

  void run() {
    const PreActivationGradient<T> dz(gemm_, in_);
    bias_gradient(gemm_, in_, dz.get());
    if (rows_.wanted.x || rows_.wanted.weight())
      run_experts(dz.get());
    if (rows_.wanted.central)
      store_central<T>(gemm_, in_, plan_, sizes_, sums_.central.get());
    gradients_.finish(gemm_);
  }

 private:
  void run_experts(const T* dz) {
    const BlockDims& d = in_.dims;
    const int64_t blocks = plan_.n_blocks(), count = std::min<int64_t>(num_threads(), blocks);

    std::vector<GradientWorker<T>> workers;
    for (int64_t w = 0; w < count; ++w)
      workers.emplace_back(rows_, sums_, in_.most_slots());
    for (int64_t e = 0; e < in_.experts; ++e) {
      if (in_.count(e) == 0) {
        zero_blocks<T>(in_, e);
        continue;
      }
      rows_.load(e, dz, gradients_);
      T* dx = rows_.wanted.x ? gradients_.row(rows_.first) : nullptr;
      parallel_for_each(count, 1, [&](int64_t w) {
        for (int64_t block = w * blocks / count; block < (w + 1) * blocks / count; ++block)
          workers[w].run(block, dx);
      });
      if (rows_.wanted.left)
        store_sum(gemm_,
                  sums_.left,
                  blocks,
                  sizes_.left_sums,
                  plan_.left_rows,
                  plan_.left_rows,
                  d.a,
                  static_cast<T*>(in_.dleft) + e * d.left_size());
      if (rows_.wanted.right)
        store_sum(gemm_,
                  sums_.right,
                  blocks,
                  sizes_.right_sums,
                  plan_.b_panels * kPanel,
                  d.b,
                  plan_.right_columns,
                  static_cast<T*>(in_.dright) + e * d.right_size());
    }
  }

  const GemmKernels& gemm_;
  const LinearBackward& in_;
  RebuildPlan plan_;
  GradientSizes sizes_;
  RowGradients<T> gradients_;
  ExpertRows<T> rows_;
  GradientSums sums_;
};

}  // namespace

void rebuild_backward(const LinearBackward& in) {
  with_element_type(in.dtype,
                    [&]<class T>(const GemmKernels& gemm, T) { Backward<T>(gemm, in).run(); });
}

}  // namespace mpoe
