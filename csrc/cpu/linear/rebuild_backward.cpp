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
               std::int64_t blocks,
               std::int64_t block_size,
               std::int64_t height,
               std::int64_t rows,
               std::int64_t width,
               T* out) {
  parallel_for(
      0, rows, ceil_divide(16 * 1024, width * blocks), [&](std::int64_t begin, std::int64_t end) {
        std::vector<float> row(round_up(width, kPanel));
        for (std::int64_t r = begin; r < end; ++r) {
          std::fill(row.begin(), row.end(), 0.0f);
          for (std::int64_t block = 0; block < blocks; ++block)
            for (std::int64_t c = 0; c < width; c += kPanel) {
              const float* from =
                  sums.get() + block * block_size + (c / kPanel * height + r) * kPanel;
              for (std::int64_t k = 0; k < kPanel; ++k)
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
  const std::int64_t stride = d.iC * d.jC * d.b, k_blocks = plan.k_blocks();
  parallel_for(0, plan.n_blocks() * k_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const Span i_range = plan.n_columns(block / k_blocks).c,
                 j_range = plan.k_span(block % k_blocks);
      std::int64_t column = 0;
      for (std::int64_t i = i_range.first; i < i_range.last; ++i)
        for (std::int64_t j = j_range.first; j < j_range.last; ++j, column += sizes.b) {
          // Sums are read sequentially, in runs of the columns of one pair in one panel.
          for (std::int64_t b = 0, run = 0; b < d.b; b += run) {
            const std::int64_t c = column + b;
            run = std::min(d.b - b, kPanel - c % kPanel);
            const float* from =
                sums + block * sizes.central_sums + c / kPanel * d.a * kPanel + c % kPanel;
            T* out = static_cast<T*>(in.dcentral) + (i * d.jC + j) * d.b + b;
            for (std::int64_t a = 0; a < d.a; ++a)
              gemm.round_row(from + a * kPanel, out + a * stride, run);
          }
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
        rows_(gemm, in, plan_, sizes_, most_rows(in)) {
    const std::int64_t blocks = plan_.n_blocks();
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
  static std::int64_t most_rows(const LinearInputs& in) {
    std::int64_t most = 0;
    for (std::int64_t e = 0; e < in.experts; ++e)
      most = std::max(most, in.offsets[e + 1] - in.offsets[e]);
    return most;
  }

  void run_experts(const T* dz) {
    const BlockDims& d = in_.dims;
    const std::int64_t blocks = plan_.n_blocks(),
                       count = std::min<std::int64_t>(num_threads(), blocks);
    const std::int64_t left_size = plan_.left_rows * d.a, right_size = d.b * plan_.right_columns;
    std::vector<GradientWorker<T>> workers;
    for (std::int64_t w = 0; w < count; ++w)
      workers.emplace_back(rows_, sums_, most_rows(in_));
    for (std::int64_t e = 0; e < in_.experts; ++e) {
      if (in_.offsets[e + 1] == in_.offsets[e]) {
        zero_rows(in_.dleft, e, e + 1, left_size * sizeof(T));
        zero_rows(in_.dright, e, e + 1, right_size * sizeof(T));
        continue;
      }
      rows_.load(e, dz, gradients_);
      T* dx = rows_.wanted.x ? gradients_.row(rows_.first) : nullptr;
      parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t w = begin; w < end; ++w)
          for (std::int64_t block = w * blocks / count; block < (w + 1) * blocks / count; ++block)
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
                  static_cast<T*>(in_.dleft) + e * left_size);
      if (rows_.wanted.right)
        store_sum(gemm_,
                  sums_.right,
                  blocks,
                  sizes_.right_sums,
                  plan_.b_panels * kPanel,
                  d.b,
                  plan_.right_columns,
                  static_cast<T*>(in_.dright) + e * right_size);
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
