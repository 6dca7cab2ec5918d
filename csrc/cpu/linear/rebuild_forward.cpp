// Forward of the rebuild strategy. A task is one expert and one block of columns; threads get runs
// of tasks of equal cost.
#include "cpu/linear/rebuild.h"

namespace mpoe {
namespace {

// What a thread needs for its tasks.
template <class T>
class ForwardWorker {
 public:
  // `central`: packed pairs in the order of central.
  ForwardWorker(const GemmKernels& gemm,
                const LinearForward& in,
                const RebuildPlan& plan,
                const T* central,
                int64_t most_rows)
      : gemm_(gemm),
        in_(in),
        plan_(plan),
        central_(central),
        blocks_(gemm, in.dims, plan),
        rows_(plan.k_blocks() * most_rows * plan.x_row),
        half_(plan.n_left * plan.k.L * plan.half_row),
        slab_(zeros<T>(plan.slab_size())),
        sums_((plan.k_blocks() > 1 ? most_rows : kMaxRows) * plan.most_panels() * kPanel),
        bias_(plan.most_panels() * kPanel, 0.0f),
        columns_(plan.most_panels()) {}

  void run(int64_t expert, int64_t block) {
    const int64_t first = in_.offsets[expert], count = in_.count(expert);
    if (expert != loaded_)
      load(expert, first, count);
    const BlockColumns n = plan_.n_columns(block);
    const int64_t panels = plan_.panels(n), blocks = plan_.k_blocks();
    place(n, panels);
    for (int64_t kb = 0; kb < blocks; ++kb) {
      const Span k = plan_.k_span(kb);
      for (int64_t k_central = k.first; k_central < k.last; ++k_central)
        for (int64_t n_central = n.central.first; n_central < n.central.last; ++n_central) {
          build_half(gemm_,
                     plan_,
                     blocks_,
                     n.left,
                     central_ + plan_.pair(k_central, n_central) * plan_.central_size(),
                     half_.get());
          build_slab(gemm_,
                     plan_,
                     blocks_,
                     n.left.size(),
                     k_central - k.first,
                     n_central - n.central.first,
                     half_.get(),
                     slab_.get());
        }
      multiply_slab(gemm_,
                    plan_,
                    k.size(),
                    panels,
                    count,
                    rows_.get() + kb * count * plan_.x_row,
                    slab_.get(),
                    BlockSums{sums_.get(), blocks > 1},
                    kb > 0,
                    [&](int64_t row, int64_t rows, const float* tile) {
                      if (kb == blocks - 1)
                        finish(first + row, rows, panels, tile);
                    });
    }
  }

 private:
  void load(int64_t expert, int64_t first, int64_t count) {
    loaded_ = expert;
    blocks_.load(gemm_, in_, plan_, expert);
    for (int64_t kb = 0; kb < plan_.k_blocks(); ++kb)
      arrange_rows<T>(
          plan_.k,
          gemm_.unit,
          plan_.k_span(kb),
          count,
          [&](int64_t t) { return row_of<T>(in_, first + t); },
          rows_.get() + kb * count * plan_.x_row,
          plan_.x_row);
  }

  // Sets where the columns of a block are, and their bias.
  void place(const BlockColumns& n, int64_t panels) {
    for (int64_t p = 0; p < panels; ++p) {
      columns_[p] = side_columns(plan_.n, n.central, n.left, p);
      if (in_.bias == nullptr)
        continue;
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t g = c / kGranule, i = c % kGranule;
        bias_[p * kPanel + c] = i < columns_[p].valid[g] ? bias(columns_[p].offset[g] + i) : 0.0f;
      }
    }
  }

  float bias(int64_t column) const { return mpoe::load(static_cast<const T*>(in_.bias)[column]); }

  void finish(int64_t slot, int64_t rows, int64_t panels, const float* tile) {
    const int64_t width = plan_.n.features;
    T* saved = in_.saved == nullptr ? nullptr : static_cast<T*>(in_.saved) + slot * width;
    Finish finish{.activation = in_.activation, .saved = saved};
    for (int64_t p = 0; p < panels; ++p) {
      if (in_.bias != nullptr)
        finish.bias = bias_.data() + p * kPanel;
      gemm_.finish(tile + p * rows * kPanel,
                   rows,
                   static_cast<T*>(in_.y) + slot * width,
                   nullptr,
                   width,
                   columns_[p],
                   finish);
    }
  }

  const GemmKernels& gemm_;
  const LinearForward& in_;
  const RebuildPlan& plan_;
  const T* central_;
  ExpertBlocks<T> blocks_;
  Buffer<T> rows_, half_;
  Buffer<T>
      slab_;  // columns that no granule fills are zero: multiplied too, their results are discarded
  Buffer<float> sums_;
  std::vector<float> bias_;
  std::vector<ColumnMap> columns_;
  int64_t loaded_ = -1;
};

template <class T>
Buffer<T> pack_whole_central(const GemmKernels& gemm,
                             const LinearInputs& in,
                             const RebuildPlan& plan) {
  const int64_t pairs = in.dims.iC * in.dims.jC;
  Buffer<T> panels(pairs * plan.central_size());
  parallel_for(pairs, 4, [&](int64_t begin, int64_t end) {
    pack_central(gemm, in, plan, begin, end - begin, panels.get() + begin * plan.central_size());
  });
  return panels;
}

// Experts with slots, whose blocks are the tasks, in order; and the cost of the experts before
// each, in rows per block.
struct Tasks {
  std::vector<int64_t> experts, before{0};
  int64_t blocks;

  Tasks(const LinearInputs& in, const RebuildPlan& plan) : blocks(plan.n_blocks()) {
    // Rebuilding costs as many multiply-adds as this many rows.
    const int64_t rebuild = in.dims.b + ceil_divide(in.dims.a * in.dims.b, plan.right_columns);
    for (int64_t e = 0; e < in.experts; ++e) {
      const int64_t count = in.count(e);
      if (count == 0)
        continue;
      experts.push_back(e);
      before.push_back(before.back() + rebuild + count);
    }
  }

  // The first task of a part when all are split into `parts` of equal cost.
  int64_t first(int64_t part, int64_t parts) const {
    const int64_t target = before.back() * part / parts;
    const int64_t k = std::upper_bound(before.begin(), before.end(), target) - before.begin() - 1;
    if (k == std::ssize(experts))
      return k * blocks;
    return k * blocks + (target - before[k]) * blocks / (before[k + 1] - before[k]);
  }
};

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  if (!zero_the_rest<T>(in))
    return;
  const RebuildPlan plan(gemm, in.dims, false, sizeof(T));
  const Tasks tasks(in, plan);
  const Buffer<T> central = pack_whole_central<T>(gemm, in, plan);
  const int64_t parts = num_threads();
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = tasks.first(end, parts);
    int64_t task = tasks.first(begin, parts);
    if (task == last)
      return;
    ForwardWorker<T> worker(gemm, in, plan, central.get(), in.most_slots());
    for (; task < last; ++task)
      worker.run(tasks.experts[task / tasks.blocks], task % tasks.blocks);
  });
}

}  // namespace

void rebuild_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) { forward<T>(gemm, in); });
}

}  // namespace mpoe
