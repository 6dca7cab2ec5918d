// Backward of chain. States are recomputed; then, from the last step to the first,
//   d operand = state^T d product,   d state = d product operand^T.
// Slots are split into groups, whose number does not depend on the number of threads. A group sums
// the gradients of its experts' blocks and of central from its first slot to its last; then groups
// are added in order.
#include "cpu/gemm/outer.h"
#include "cpu/linear/chain.h"
#include "cpu/linear/gradient.h"

namespace mpoe {
namespace {

template <class T>
class Backward {
 public:
  Backward(const GemmKernels& gemm, const LinearBackward& in)
      : gemm_(gemm),
        in_(in),
        d_(in.dims),
        x_gradients_(in),
        chain_(gemm, in, Direction::kBackward, kFewGradientRows) {
    plan_groups();
    void* const gradients[] = {in.dleft, in.dcentral, in.dright};
    for (int s = 0; s < kChainSteps; ++s) {
      const ChainStep& step = chain_.step(s);
      const AxisMatrix state{step.rest, step.met, step.k};
      leave_[s] = Permutation(chain_.sizes(), state, s == 0 ? rows_in() : chain_.gradient(s - 1));
      gradients_[s] = static_cast<T*>(gradients[static_cast<int>(step.operand)]);
      sum_size_[s] = step.k * round_up(step.n, kPanel);
      if (gradients_[s] == nullptr)
        continue;
      last_wanted_ = s;
      first_wanted_ = std::min(first_wanted_, s);
      if (is_direct(s))
        continue;
      const std::size_t sums = is_central(s) ? groups_.size() : parts_.size();
      sums_[s] = Buffer<float>(sum_size_[s] * static_cast<int64_t>(sums));
    }
    enter_ = Permutation(chain_.sizes(), rows_out(), chain_.gradient(kChainSteps - 1));
  }

  void run() {
    const PreActivationGradient<T> dz(gemm_, in_);
    bias_gradient(gemm_, in_, dz.get());
    dz_ = dz.get();
    const int64_t groups = std::ssize(groups_);
    if (groups == 1)
      run_group(0);  // all threads take part in its products with C, if C is packed by piece
    if (groups > 1)
      parallel_for_each(groups, 1, [&](int64_t g) { run_group(g); });
    for (int s = 0; s < kChainSteps; ++s) {
      if (gradients_[s] == nullptr || is_direct(s))
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

  bool is_central(int s) const { return chain_.step(s).operand == Operand::kCentral; }

  // Whether a gradient is one product of few rows that is written to its place without sums.
  bool is_direct(int s) const { return is_central(s) && chain_.packs_by_piece(); }

  struct Memory {
    ChainMemory<T> chain;
    std::array<Buffer<T>, kChainSteps> gradients;  // [(slots rest), fresh] of the products
    Buffer<T> rows;                                // of dz or dx, with their padding
    std::vector<OuterSum<T>> outer;
  };

  void run_group(int64_t group) {
    const Span slots = groups_[group];
    const int64_t count = slots.size();
    const int64_t most = chain_.packs_by_piece() ? count : std::min(chain_.block_slots(), count);
    Memory memory{.chain = chain_.memory(most), .gradients = {}, .rows = {}, .outer = {}};
    for (int s = 0; s < kChainSteps; ++s) {
      const ChainStep& step = chain_.step(s);
      memory.gradients[s] = zeros<T>(
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
        [&](int64_t k) { return dz_ + (block.first + k) * width; },
        rows);
    int s = kChainSteps - 1;
    enter_.run(
        gemm_, count, rows, d_.padded_out(), memory.gradients[s].get(), gradient_elements(s));
    for (; s >= 0; --s) {
      const T* gradient = memory.gradients[s].get();
      if (gradients_[s] != nullptr)
        add_outer(s, group, block, memory);
      if (in_.dx == nullptr && s <= first_wanted_)
        return;
      T* product = memory.chain.product.get();
      chain_.multiply(s, Direction::kBackward, block, gradient, memory.chain, product);
      const int64_t step = chain_.step(s).m * chain_.step(s).k;
      if (s > 0)
        leave_[s].run(
            gemm_, count, product, step, memory.gradients[s - 1].get(), gradient_elements(s - 1));
      else
        leave_[s].run(gemm_, count, product, step, rows, step);
    }
    for (int64_t k = 0; k < count; ++k)
      std::memcpy(
          x_gradients_.row(block.first + k), rows + k * d_.padded_in(), d_.in_features * sizeof(T));
  }

  int64_t gradient_elements(int s) const {
    return chain_.step(s).m * chain_.gradient(s).row_stride;
  }

  // Adds state^T gradient to the sums of a step's operand.
  void add_outer(int s, int64_t group, Span block, Memory& memory) {
    const int64_t m = chain_.step(s).m;
    const int64_t state_stride = chain_.state(s).row_stride, stride = chain_.gradient(s).row_stride;
    const auto add = [&](Span slots, int64_t sum, bool accumulate) {
      const int64_t row = (slots.first - block.first) * m;
      memory.outer[s](slots.size() * m,
                      memory.chain.states[s].get() + row * state_stride,
                      state_stride,
                      memory.gradients[s].get() + row * stride,
                      stride,
                      sums_[s].get() + sum * sum_size_[s],
                      accumulate);
    };
    if (is_direct(s)) {
      for (int64_t first = 0; first < chain_.step(s).n; first += chain_.segment())
        outer_of_few(gemm_,
                     block.size() * m,
                     memory.chain.states[s].get(),
                     state_stride,
                     chain_.step(s).k,
                     memory.gradients[s].get() + first,
                     stride,
                     chain_.segment(),
                     gradients_[s] + first / chain_.segment() * chain_.segment_step());
      return;
    }
    if (is_central(s))
      return add(block, group, block.first > groups_[group].first);
    int64_t part = group_parts_[group];
    for_each_expert(in_, block, [&](int64_t expert, Span slots) {
      while (parts_[part].expert != expert)
        ++part;
      add(slots, part, slots.first > parts_[part].first);
    });
  }

  // Stores the gradient of an expert's block, the sum over `parts`.
  void store_gradient(int s, int64_t expert, Span parts) {
    const ChainStep& step = chain_.step(s);
    const int64_t size = step.k * step.n;
    if (parts.first == parts.last)
      return zero_rows(gradients_[s], expert, expert + 1, size * sizeof(T));
    const GemmKernels& floats = gemm_kernels(Dtype::kFloat32);
    float* total = sums_[s].get() + parts.first * sum_size_[s];
    for (int64_t p = parts.first + 1; p < parts.last; ++p)
      floats.add_row(sums_[s].get() + p * sum_size_[s], total, sum_size_[s]);
    const Permutation arrange(
        chain_.sizes(), {step.met, step.fresh, round_up(step.n, kPanel)}, natural(step.operand));
    if constexpr (!std::is_same_v<T, float>)
      gemm_.round_row(total, total, sum_size_[s]);  // in place
    const T* rounded = reinterpret_cast<const T*>(total);
    T* out = gradients_[s] + expert * size;
    if (is_central(s))
      arrange.run_by_all(gemm_, rounded, out);
    else
      arrange.run(gemm_, 1, rounded, 0, out, 0);
  }

  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const BlockDims& d_;
  RowGradients<T> x_gradients_;
  const Chain<T> chain_;
  std::array<Permutation, kChainSteps>
      leave_;          // gradient of a state to that of the preceding product, or of x
  Permutation enter_;  // dz to the gradient of the last product
  std::array<T*, kChainSteps> gradients_;  // of the steps' operands; null: not wanted
  int first_wanted_ = kChainSteps, last_wanted_ = -1;
  std::vector<Span> groups_;          // of slots
  std::vector<Part> parts_;           // by group, then expert
  std::vector<int64_t> group_parts_;  // the first part of each group
  std::vector<Span> expert_parts_;
  std::array<Buffer<float>, kChainSteps> sums_;  // of every part; for central, of every group
  std::array<int64_t, kChainSteps> sum_size_;
  const T* dz_ = nullptr;
};

}  // namespace

void chain_backward(const LinearBackward& in) {
  with_element_type(in.dtype,
                    [&]<class T>(const GemmKernels& gemm, T) { Backward<T>(gemm, in).run(); });
}

}  // namespace mpoe
