// Backward of half_left, one expert at a time. Indices are those of half.h: t is a slot, features
// in are (iL iC iR), features out (jL jC jR). The *exchanged* problem is the one with i and j
// exchanged, whose weight is W^T: left [jL, iL, a], central [a, jC, iC, b], right [b, jR, iR].
//
// dx = dz W^T is the forward of the exchanged problem. The gradients of the blocks never build that
// of W (half_gradient.h):
//   u = x LC,  du = dz right^T,
//   dright = u^T dz,  dLC = x^T du,  dleft = dLC central^T,  dcentral += left^T dLC
// in the order that multiplies by LC first. A shape where right comes first takes the same formulas
// of the exchanged problem, where x and dz change places: they are the products of the order with
// right first, from the last to the first.
//
//   result                 problem    blocks              plan, panels of central  its x and dz
//   dx                     exchanged  exchanged copies    exchanged_               dz, none
//   blocks, LC first       plain      the caller's        plain_                   x, dz
//   blocks, right first    exchanged  those of dx         exchanged_               dz, x (gathered)
//
// `exchanged_plan_.half_first` picks HalfFirst or RightFirst for dx, and `plain_plan_.half_first`
// one of the last two rows.
//
// Experts are split into groups. dcentral is summed within a group in the order of experts, then
// over groups, whose number does not depend on the number of threads if dcentral is wanted.
#include <optional>

#include "cpu/linear/half_gradient.h"

namespace mpoe {
namespace {

BlockDims exchanged(const BlockDims& d) {
  return {d.jL, d.iL, d.a, d.jC, d.iC, d.b, d.jR, d.iR, d.out_features, d.in_features};
}

// One expert at a time of the plain or of the exchanged problem, as an argument of the forward's
// classes. They keep a reference to `in`, and `in` points to members of this object: it stays where
// it is. Of the exchanged problem `set_rows` gives the expert's rows, whose slots start at 0. Of the
// plain one `in` has the rows of all experts; HalfGradient, which alone reads it, is given the
// expert's slots.
template <class T>
class OneExpert {
 public:
  LinearForward in{};

  OneExpert(const LinearBackward& full, bool exchanges) : full_(full), exchanges_(exchanges) {
    static_cast<LinearInputs&>(in) = full;
    in.activation = Activation::kNone;
    in.experts = 1;
    in.offsets = offsets_;
    if (!exchanges_)
      return;
    in.dims = exchanged(full.dims);
    in.row_index = nullptr;
    left_ = Buffer<T>(in.dims.left_size());
    right_ = Buffer<T>(in.dims.right_size());
    in.left = left_.get();
    in.right = right_.get();
  }
  OneExpert(const OneExpert&) = delete;

  // Takes an expert's blocks: points to them, or copies them with i and j exchanged.
  void set_blocks(const GemmKernels& gemm, int64_t expert) {
    const BlockDims& d = full_.dims;
    const T* left = left_of<T>(full_, expert);
    const T* right = right_of<T>(full_, expert);
    if (!exchanges_) {
      in.left = left;
      in.right = right;
      return;
    }
    for (int64_t i = 0; i < d.iL; ++i)
      for (int64_t j = 0; j < d.jL; ++j)
        std::memcpy(
            left_.get() + (j * d.iL + i) * d.a, left + (i * d.jL + j) * d.a, d.a * sizeof(T));
    const int64_t pairs = d.iR * d.jR;
    for (int64_t b = 0; b < d.b; ++b)
      gemm.transpose(right + b * pairs, d.jR, d.iR, d.jR, right_.get() + b * pairs, d.iR);
  }

  // The expert's `count` rows are those of x, their results go to y.
  void set_rows(const T* x, T* y, int64_t count) {
    in.x = x;
    in.y = y;
    offsets_[1] = count;
  }

 private:
  const LinearBackward& full_;
  const bool exchanges_;  // i and j
  int64_t offsets_[2] = {0, 0};
  Buffer<T> left_, right_;  // exchanged copies
};

// Everything that the groups of experts share and fill.
template <class T>
class HalfBackward {
 public:
  HalfBackward(const GemmKernels& gemm, const LinearBackward& in)
      : gemm_(gemm),
        in_(in),
        d_(in.dims),
        exchanged_dims_(exchanged(in.dims)),
        plain_plan_(gemm, d_, in.order.half_first),
        exchanged_plan_(gemm, exchanged_dims_, in.order.exchanged_half_first),
        wanted_(in),
        weights_exchanged_(!plain_plan_.half_first),
        weight_dims_(weights_exchanged_ ? exchanged_dims_ : d_),
        weight_plan_(weights_exchanged_ ? exchanged_plan_ : plain_plan_),
        most_slots_(in.most_slots()),
        x_gradients_(in, /*together=*/true),
        dz_(gemm, in) {
    if (wanted_.x || (wanted_.weight() && weights_exchanged_))
      exchanged_panels_ =
          pack_central<T>(gemm, exchanged_dims_, in.central, exchanged_plan_, /*exchanged=*/true);
    if (wanted_.weight() && !weights_exchanged_)
      plain_panels_ = pack_central<T>(gemm, d_, in.central, plain_plan_);
    if (wanted_.left)
      transpose_central();
    plan_groups();
  }

  void run() {
    bias_gradient(gemm_, in_, dz_.get());
    parallel_for_each(std::ssize(groups_), 1, [&](int64_t g) { run_group(g); });
    if (wanted_.central)
      store_central();
    x_gradients_.finish(gemm_);
  }

 private:
  // What computes the gradients of a group, one expert at a time.
  struct Workers {
    OneExpert<T> plain, exchanged;
    // dx: exactly one of these, by exchanged_plan_.half_first; none if dx is not wanted
    std::optional<HalfFirst<T>> dx_half_first;
    std::optional<RightFirst<T>> dx_right_first;
    std::optional<HalfGradient<T>> weights;  // if a gradient of blocks is wanted
    Buffer<T> gathered;                      // rows of x

    Workers(HalfBackward& all, int64_t group) : plain(all.in_, false), exchanged(all.in_, true) {
      const T* exchanged_panels = all.exchanged_panels_.get();
      if (all.wanted_.x && all.exchanged_plan_.half_first)
        dx_half_first.emplace(all.gemm_, exchanged.in, all.exchanged_plan_, exchanged_panels);
      else if (all.wanted_.x)
        dx_right_first.emplace(
            all.gemm_, exchanged.in, all.exchanged_plan_, exchanged_panels, all.most_slots_);
      if (!all.wanted_.weight())
        return;
      // With LC first whatever `weight_plan_` says of the forward: see the head.
      weights.emplace(
          all.gemm_,
          all.weights_exchanged_ ? exchanged.in : plain.in,
          all.weight_plan_,
          all.weights_exchanged_ ? exchanged_panels : all.plain_panels_.get(),
          all.central_transposed_panels_.get(),
          all.wanted_,
          all.wanted_.central ? all.central_sums_.get() + group * all.central_size_ : nullptr);
      if (all.weights_exchanged_ && all.in_.row_index != nullptr)
        gathered = Buffer<T>(all.most_slots_ * all.d_.in_features);
    }
  };

  // Position of pair (iC, jC) of the problem of the weights in central, which is not exchanged.
  int64_t pair_in_central(int64_t pair) const {
    const int64_t iC = pair / weight_dims_.jC, jC = pair % weight_dims_.jC;
    return weights_exchanged_ ? jC * weight_dims_.iC + iC : pair;
  }

  // Panels of central^T for the problem of the weights: columns a, inner (iC jC b), b in whole
  // granules.
  void transpose_central() {
    const int64_t b = weight_plan_.b, pairs = d_.iC * d_.jC, inner = pairs * b;
    const int64_t size = round_up(d_.a, kPanel) * inner;
    central_transposed_panels_ = b == d_.b ? Buffer<T>(size) : zeros<T>(size);
    parallel_for_each(pairs, ceil_divide(kTaskElements, d_.a * b), [&](int64_t pair) {
      gemm_.pack_transposed(central_transposed_panels_.get() + pair * b * kPanel,
                            inner / gemm_.unit,
                            static_cast<const T*>(in_.central) + pair_in_central(pair) * d_.b,
                            pairs * d_.b,
                            d_.b,
                            d_.a);
    });
  }

  void plan_groups() {
    central_size_ = ceil_divide(d_.iC * d_.jC * weight_plan_.b, kPanel) * d_.a * kPanel;
    const int64_t most = wanted_.central ? most_groups<T>(d_, central_size_) : 4 * num_threads();
    const int64_t count = std::min(most, in_.experts);
    for (int64_t g = 0; g < count; ++g)
      groups_.push_back({in_.experts * g / count, in_.experts * (g + 1) / count});
    if (wanted_.central)
      central_sums_ = zeros<float>(count * central_size_);
  }

  void run_group(int64_t group) {
    Workers workers(*this, group);
    for (int64_t e = groups_[group].first; e < groups_[group].last; ++e) {
      if (in_.count(e) == 0) {
        zero_blocks<T>(in_, e);
        continue;
      }
      const T* dz = dz_.get() + in_.offsets[e] * d_.out_features;
      if (exchanged_panels_) {
        T* dx = wanted_.x ? x_gradients_.row(in_.offsets[e]) : nullptr;
        workers.exchanged.set_blocks(gemm_, e);
        workers.exchanged.set_rows(dz, dx, in_.count(e));
      }
      if (workers.dx_half_first)
        workers.dx_half_first->run(0);
      if (workers.dx_right_first)
        workers.dx_right_first->run(0);
      if (workers.weights)
        weights_of_expert(e, dz, workers);
    }
  }

  void weights_of_expert(int64_t expert, const T* dz, Workers& workers) const {
    BlockPlaces<T> places{
        .left = wanted_.left ? static_cast<T*>(in_.dleft) + expert * d_.left_size() : nullptr,
        .left_i = d_.jL * d_.a,
        .left_j = d_.a,
        .right = wanted_.right ? static_cast<T*>(in_.dright) + expert * d_.right_size() : nullptr,
        .right_b = d_.iR * d_.jR,
        .right_i = d_.jR,
        .right_j = 1};
    const int64_t first = in_.offsets[expert], count = in_.count(expert);
    if (!weights_exchanged_) {
      workers.plain.set_blocks(gemm_, expert);
      workers.weights->run(first, count, dz, places);
      return;
    }
    std::swap(places.left_i, places.left_j);
    std::swap(places.right_i, places.right_j);
    workers.weights->run(0, count, rows_of_x(first, count, workers.gathered.get()), places);
  }

  // x of consecutive slots, gathered if they read rows of an index.
  const T* rows_of_x(int64_t first, int64_t count, T* gathered) const {
    if (in_.row_index == nullptr)
      return row_of<T>(in_, first);
    const int64_t width = d_.in_features;
    for (int64_t t = 0; t < count; ++t)
      std::memcpy(gathered + t * width, row_of<T>(in_, first + t), width * sizeof(T));
    return gathered;
  }

  // dcentral [a, (iC jC), b] from sums [group, panel of (iC jC b), a, 32] of the problem of the
  // weights, whose b is in whole granules. A panel's 32 columns may lie in several pairs (iC, jC):
  // they are stored in runs of the columns of one pair.
  void store_central() {
    const int64_t pairs = d_.iC * d_.jC, columns = pairs * weight_plan_.b;
    const int64_t panel_size = d_.a * kPanel;
    const GemmKernels& floats = gemm_kernels(Dtype::kFloat32);
    const int64_t grain = ceil_divide(kTaskElements, panel_size);
    parallel_for_each(ceil_divide(columns, kPanel), grain, [&](int64_t panel) {
      float* total = central_sums_.get() + panel * panel_size;
      for (int64_t g = 1; g < std::ssize(groups_); ++g)
        floats.add_row(total + g * central_size_, total, panel_size);
      const int64_t last = std::min((panel + 1) * kPanel, columns);
      int64_t column = panel * kPanel;
      while (column < last) {
        const int64_t pair = column / weight_plan_.b, b = column % weight_plan_.b;
        const int64_t run = std::min(weight_plan_.b - b, last - column);
        const int64_t valid = std::min(d_.b - b, run);  // the rest is padding
        T* out = static_cast<T*>(in_.dcentral) + pair_in_central(pair) * d_.b + b;
        for (int64_t a = 0; valid > 0 && a < d_.a; ++a)
          gemm_.round_row(total + a * kPanel + column % kPanel, out + a * pairs * d_.b, valid);
        column += run;
      }
    });
  }

  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const BlockDims& d_;
  const BlockDims exchanged_dims_;
  const HalfPlan plain_plan_, exchanged_plan_;
  const Wanted wanted_;
  const bool weights_exchanged_;  // gradients of blocks are those of the exchanged problem
  const BlockDims& weight_dims_;  // of that problem
  const HalfPlan& weight_plan_;
  const int64_t most_slots_;  // of an expert
  RowGradients<T> x_gradients_;
  const PreActivationGradient<T> dz_;
  Buffer<T> plain_panels_, exchanged_panels_;  // of central, if a result needs them
  Buffer<T> central_transposed_panels_;
  std::vector<Span> groups_;  // of experts
  int64_t central_size_ = 0;  // elements of a group's sums
  Buffer<float> central_sums_;
};

}  // namespace

void half_left_backward(const LinearBackward& in) {
  with_element_type(in.dtype,
                    [&]<class T>(const GemmKernels& gemm, T) { HalfBackward<T>(gemm, in).run(); });
}

}  // namespace mpoe
