// Backward of chain (chain.h). States are recomputed; then, from the last step to the first,
//   d operand = state^T d product,   d state = d product operand^T.
//
// Slots are split into groups, whose number does not depend on the number of threads. The slots of
// one expert in one group are a part; it has a sum of its own of the gradients of L and of R. C has
// a sum per group. A group adds from its first slot to its last; then the parts of an expert, and
// the groups, are added in order. With 3 experts, offsets 0 3 3 8, and 2 groups:
//
//   slot     0 1 2 3 4 5 6 7
//   expert   0 0 0 2 2 2 2 2
//   group    0 0 0 0 1 1 1 1
//   part     0 0 0 1 2 2 2 2
//
//   groups_[g]        slots of a group, ascending
//   parts_[p]         expert and first slot of a part, by group, then expert
//   group_parts_[g]   the first part of a group
//   expert_parts_[e]  the parts of an expert, consecutive as its slots are; empty without slots
#include "cpu/gemm/outer.h"
#include "cpu/linear/chain.h"
#include "cpu/linear/gradient.h"

namespace mpoe {
namespace {

template <class T>
class ChainBackward {
 public:
  ChainBackward(const GemmKernels& gemm, const LinearBackward& in)
      : gemm_(gemm),
        in_(in),
        d_(in.dims),
        x_gradients_(in),
        dz_(gemm, in),
        chain_(gemm, in, Direction::kBackward, kFewGradientRows) {
    plan_groups();
    plan_sums();
    plan_permutations();
  }

  void run() {
    bias_gradient(gemm_, in_, dz_.get());
    if (in_.dx == nullptr && last_wanted_ < 0)
      return;
    const int64_t groups = std::ssize(groups_);
    if (groups == 1)
      run_group(0);  // all threads take part in its products with C, if C is packed by piece
    else
      parallel_for_each(groups, 1, [&](int64_t g) { run_group(g); });
    for (int s = 0; s < kChainSteps; ++s) {
      if (block_gradients_[s] == nullptr || is_written_in_place(s))
        continue;
      if (is_central(s)) {
        store_gradient(s, 0, {0, groups});
        continue;
      }
      parallel_for_each(in_.experts, 1, [&](int64_t e) { store_gradient(s, e, expert_parts_[e]); });
    }
    x_gradients_.finish(gemm_);
  }

 private:
  // The slots of one expert in one group.
  struct Part {
    int64_t expert, first;
  };

  void plan_groups() {
    const int64_t filled = in_.filled(), most = most_groups<T>(d_, d_.central_size());
    const int64_t count = chain_.packs_by_piece() ? 1 : std::min(most, filled);
    expert_parts_.resize(in_.experts);
    for (int64_t g = 0; g < count; ++g) {
      groups_.push_back({filled * g / count, filled * (g + 1) / count});
      group_parts_.push_back(std::ssize(parts_));
      for_each_expert(in_, groups_[g], [&](int64_t expert, Span slots) {
        const int64_t part = std::ssize(parts_);
        Span& parts = expert_parts_[expert];
        parts = {parts.first == parts.last ? part : parts.first, part + 1};
        parts_.push_back({expert, slots.first});
      });
    }
  }

  void plan_sums() {
    void* const gradients[] = {in_.dleft, in_.dcentral, in_.dright};
    for (int s = 0; s < kChainSteps; ++s) {
      const ChainStep& step = chain_.step(s);
      block_gradients_[s] = static_cast<T*>(gradients[static_cast<int>(step.operand)]);
      sum_size_[s] = step.k * round_up(step.n, kPanel);
      if (block_gradients_[s] == nullptr)
        continue;
      last_wanted_ = s;
      first_wanted_ = std::min(first_wanted_, s);
      if (is_written_in_place(s))
        continue;
      const int64_t sums = is_central(s) ? std::ssize(groups_) : std::ssize(parts_);
      sums_[s] = Buffer<float>(sum_size_[s] * sums);
      sum_to_block_[s] = Permutation(
          chain_.sizes(), {step.met, step.fresh, round_up(step.n, kPanel)}, natural(step.operand));
    }
  }

  void plan_permutations() {
    for (int s = 0; s < kChainSteps; ++s) {
      const ChainStep& step = chain_.step(s);
      const AxisMatrix state{step.rest, step.met, step.k};
      to_preceding_[s] =
          Permutation(chain_.sizes(), state, s == 0 ? rows_in() : chain_.gradient(s - 1));
    }
    dz_to_last_ = Permutation(chain_.sizes(), rows_out(), chain_.gradient(kChainSteps - 1));
  }

  bool is_central(int s) const { return chain_.step(s).operand == Operand::kCentral; }

  // Whether a gradient is one product of few rows that is written to its place without sums.
  bool is_written_in_place(int s) const { return is_central(s) && chain_.packs_by_piece(); }

  struct Memory {
    ChainMemory<T> chain;
    std::array<Buffer<T>, kChainSteps> product_gradients;  // [(slots rest), fresh]
    Buffer<T> rows;                                        // of dz or dx, with their padding
    std::vector<OuterSum<T>> outer;
  };

  void run_group(int64_t group) {
    const Span slots = groups_[group];
    const int64_t count = slots.size();
    const int64_t most = chain_.packs_by_piece() ? count : std::min(chain_.block_slots(), count);
    Memory memory{chain_.memory(most), {}, {}, {}};
    for (int s = 0; s < kChainSteps; ++s) {
      const ChainStep& step = chain_.step(s);
      memory.product_gradients[s] = zeros<T>(
          most * step.m * chain_.gradient(s).row_stride);  // rows may end in a partial unit
      memory.outer.emplace_back(gemm_, step.k, step.n);
    }
    memory.rows = Buffer<T>(most * std::max(d_.padded_in(), d_.padded_out()));
    for (int64_t first = slots.first; first < slots.last; first += most)
      run_block(group, {first, std::min(first + most, slots.last)}, memory);
  }

  void run_block(int64_t group, Span block, Memory& memory) {
    const int64_t count = block.size(), width = d_.out_features;
    if (last_wanted_ >= 0)
      chain_.compute_states(block, last_wanted_, memory.chain);
    T* rows = memory.rows.get();
    pad_rows<T>(
        count,
        width,
        d_.padded_out(),
        [&](int64_t k) { return dz_.get() + (block.first + k) * width; },
        rows);
    constexpr int kLast = kChainSteps - 1;
    dz_to_last_.run(gemm_,
                    count,
                    rows,
                    d_.padded_out(),
                    memory.product_gradients[kLast].get(),
                    gradient_elements(kLast));
    // At the head of the loop, product_gradients[s] is that of the block's product of step s, and
    // the gradients of the operands of all later steps have their shares of the block.
    for (int s = kLast; s >= 0; --s) {
      if (block_gradients_[s] != nullptr)
        add_outer(s, group, block, memory);
      if (in_.dx == nullptr && s <= first_wanted_)
        return;
      T* product = memory.chain.product.get();
      const T* gradient = memory.product_gradients[s].get();
      chain_.multiply(s, Direction::kBackward, block, gradient, memory.chain, product);
      const int64_t state_elements = chain_.step(s).m * chain_.step(s).k;
      T* preceding = s > 0 ? memory.product_gradients[s - 1].get() : rows;
      to_preceding_[s].run(gemm_,
                           count,
                           product,
                           state_elements,
                           preceding,
                           s > 0 ? gradient_elements(s - 1) : state_elements);
    }
    for (int64_t k = 0; k < count; ++k)
      std::memcpy(
          x_gradients_.row(block.first + k), rows + k * d_.padded_in(), d_.in_features * sizeof(T));
  }

  int64_t gradient_elements(int s) const {
    return chain_.step(s).m * chain_.gradient(s).row_stride;
  }

  // Adds the block's state^T gradient to the gradient of a step's operand: of C in place or in the
  // sum of the group, of L and R in the sums of the group's parts.
  void add_outer(int s, int64_t group, Span block, Memory& memory) {
    if (is_written_in_place(s))
      return write_in_place(s, block, memory);
    if (is_central(s))
      return add_to_sum(s, block, block, group, block.first > groups_[group].first, memory);
    int64_t part = group_parts_[group];
    for_each_expert(in_, block, [&](int64_t expert, Span slots) {
      while (parts_[part].expert != expert)
        ++part;
      add_to_sum(s, block, slots, part, slots.first > parts_[part].first, memory);
    });
  }

  // All of C's gradient, segment by segment of its columns (Chain::packs_by_piece).
  void write_in_place(int s, Span block, Memory& memory) const {
    const int64_t segment = chain_.segment();
    for (int64_t q = 0; q < chain_.step(s).n / segment; ++q)
      outer_of_few(gemm_,
                   block.size() * chain_.step(s).m,
                   memory.chain.states[s].get(),
                   chain_.state(s).row_stride,
                   chain_.step(s).k,
                   memory.product_gradients[s].get() + q * segment,
                   chain_.gradient(s).row_stride,
                   segment,
                   block_gradients_[s] + q * chain_.segment_step());
  }

  // Adds the share of some slots of a block to the sum number `sum`, or starts it with them unless
  // `accumulate`.
  void add_to_sum(int s, Span block, Span slots, int64_t sum, bool accumulate, Memory& memory) {
    const int64_t m = chain_.step(s).m, row = (slots.first - block.first) * m;
    const int64_t state_stride = chain_.state(s).row_stride, stride = chain_.gradient(s).row_stride;
    memory.outer[s](slots.size() * m,
                    memory.chain.states[s].get() + row * state_stride,
                    state_stride,
                    memory.product_gradients[s].get() + row * stride,
                    stride,
                    sums_[s].get() + sum * sum_size_[s],
                    accumulate);
  }

  // Stores the gradient of an expert's block, the sum over `parts`.
  void store_gradient(int s, int64_t expert, Span parts) {
    const ChainStep& step = chain_.step(s);
    const int64_t size = step.k * step.n;
    if (parts.first == parts.last)
      return zero_rows(block_gradients_[s], expert, expert + 1, size * sizeof(T));
    const GemmKernels& floats = gemm_kernels(Dtype::kFloat32);
    float* total = sums_[s].get() + parts.first * sum_size_[s];
    for (int64_t p = parts.first + 1; p < parts.last; ++p)
      floats.add_row(sums_[s].get() + p * sum_size_[s], total, sum_size_[s]);
    if constexpr (!std::is_same_v<T, float>)
      gemm_.round_row(total, total, sum_size_[s]);  // in place, as gemm.h allows
    const T* rounded = reinterpret_cast<const T*>(total);
    T* out = block_gradients_[s] + expert * size;
    if (is_central(s))
      sum_to_block_[s].run_by_all(gemm_, rounded, out);
    else
      sum_to_block_[s].run(gemm_, 1, rounded, 0, out, 0);
  }

  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const BlockDims& d_;
  RowGradients<T> x_gradients_;
  const PreActivationGradient<T> dz_;
  const Chain<T> chain_;
  Permutation dz_to_last_;  // rows of dz to the gradient of the last product
  // Of a step: the gradient of its state to that of the preceding product, or to rows of dx; its
  // operand's sum to the order of L, C or R in memory.
  std::array<Permutation, kChainSteps> to_preceding_, sum_to_block_;
  std::array<T*, kChainSteps> block_gradients_;  // of the steps' operands; null: not wanted
  int first_wanted_ = kChainSteps, last_wanted_ = -1;
  std::vector<Span> groups_;  // of slots
  std::vector<Part> parts_;
  std::vector<int64_t> group_parts_;
  std::vector<Span> expert_parts_;
  std::array<Buffer<float>, kChainSteps> sums_;  // of every part; for central, of every group
  std::array<int64_t, kChainSteps> sum_size_;
};

}  // namespace

void chain_backward(const LinearBackward& in) {
  with_element_type(in.dtype,
                    [&]<class T>(const GemmKernels& gemm, T) { ChainBackward<T>(gemm, in).run(); });
}

}  // namespace mpoe
