// Backward of half_left, one expert at a time. dx = dz W^T is the forward with the sides of the
// blocks exchanged
// (`OneExpert`). The gradients of the blocks never build that of W: with u = x LC and du = dz
// right^T,
//   dright = u^T dz,   dLC = x^T du,   dleft = dLC central^T,   dcentral += left^T dLC
// in the order that multiplies by LC first; a shape where right comes first uses the exchanged
// blocks instead. Experts are split into groups, whose number does not depend on the number of
// threads; dcentral and dbias are summed within a group in the order of experts, then over groups.
#include <memory>

#include "cpu/linear/half_gradient.h"

namespace mpoe {
namespace {

BlockDims exchanged(const BlockDims& d) {
  return {d.jL, d.iL, d.a, d.jC, d.iC, d.b, d.jR, d.iR, d.out_features, d.in_features};
}

// One expert of a problem, possibly with sides exchanged, as an argument of the forward's classes.
template <class T>
struct OneExpert {
  LinearForward in{};
  int64_t offsets[2] = {0, 0};
  Buffer<T> left, right;  // exchanged copies

  OneExpert(const LinearBackward& full, bool exchange) {
    static_cast<LinearInputs&>(in) = full;
    in.activation = Activation::kNone;
    in.experts = 1;
    in.offsets = offsets;
    if (!exchange)
      return;
    in.dims = exchanged(full.dims);
    in.row_index = nullptr;
    left = Buffer<T>(in.dims.left_size());
    right = Buffer<T>(in.dims.right_size());
    in.left = left.get();
    in.right = right.get();
  }

  // Blocks of one expert in this problem's order.
  void load(const GemmKernels& gemm, const LinearBackward& full, int64_t expert) {
    const BlockDims& d = full.dims;
    const T* from_left = left_of<T>(full, expert);
    const T* from_right = right_of<T>(full, expert);
    if (!left) {
      in.left = from_left;
      in.right = from_right;
      return;
    }
    for (int64_t i = 0; i < d.iL; ++i)
      for (int64_t j = 0; j < d.jL; ++j)
        std::memcpy(
            left.get() + (j * d.iL + i) * d.a, from_left + (i * d.jL + j) * d.a, d.a * sizeof(T));
    for (int64_t b = 0; b < d.b; ++b)
      gemm.transpose(
          from_right + b * d.iR * d.jR, d.jR, d.iR, d.jR, right.get() + b * d.iR * d.jR, d.iR);
  }
};

// Pair (iC, jC) of the possibly exchanged problem `d` as central has it.
int64_t place_of(const BlockDims& d, bool exchange, int64_t pair) {
  return exchange ? pair % d.jC * d.iC + pair / d.jC : pair;
}

// Panels of central^T: columns a, inner (iC jC b) of the possibly exchanged problem `d`, b in whole
// granules.
template <class T>
Buffer<T> turn_central(const GemmKernels& gemm,
                       const BlockDims& d,
                       bool exchange,
                       const void* central,
                       const HalfPlan& plan) {
  const int64_t pairs = d.iC * d.jC, inner = pairs * plan.b, size = round_up(d.a, kPanel) * inner;
  Buffer<T> panels = plan.b == d.b ? Buffer<T>(size) : zeros<T>(size);
  parallel_for_each(pairs, ceil_divide(16 * 1024, d.a * plan.b), [&](int64_t pair) {
    gemm.pack_transposed(panels.get() + pair * plan.b * kPanel,
                         inner / gemm.unit,
                         static_cast<const T*>(central) + place_of(d, exchange, pair) * d.b,
                         pairs * d.b,
                         d.b,
                         d.a);
  });
  return panels;
}

// dcentral from sums [group, panels of (iC jC b), a, 32] of the possibly exchanged problem `d`.
template <class T>
void store_central(const GemmKernels& gemm,
                   const LinearBackward& in,
                   const BlockDims& d,
                   bool exchange,
                   const HalfPlan& plan,
                   int64_t groups,
                   float* sums) {
  const int64_t pairs = d.iC * d.jC, panels = ceil_divide(pairs * plan.b, kPanel),
                panel = d.a * kPanel;
  const GemmKernels& floats = gemm_kernels(Dtype::kFloat32);
  parallel_for_each(panels, ceil_divide(16 * 1024, panel), [&](int64_t p) {
    float* total = sums + p * panel;
    for (int64_t g = 1; g < groups; ++g)
      floats.add_row(total + g * panels * panel, total, panel);
    // In runs of the columns of one pair.
    const int64_t last = std::min((p + 1) * kPanel, pairs * plan.b);
    for (int64_t column = p * kPanel, run = 0; column < last; column += run) {
      const int64_t b = column % plan.b, valid = std::min(d.b - b, last - column);
      run = std::min(plan.b - b, last - column);
      T* out = static_cast<T*>(in.dcentral) + place_of(d, exchange, column / plan.b) * d.b + b;
      for (int64_t a = 0; valid > 0 && a < d.a; ++a)
        gemm.round_row(total + a * kPanel + column % kPanel, out + a * pairs * d.b, valid);
    }
  });
}

// Everything that the groups of experts share and fill.
template <class T>
class Backward {
 public:
  Backward(const GemmKernels& gemm, const LinearBackward& in)
      : gemm_(gemm),
        in_(in),
        d_(in.dims),
        plan_(gemm, in.dims, in.order.half_first),
        turned_plan_(gemm, exchanged(in.dims), in.order.transposed_half_first),
        wanted_(in),
        exchange_(!plan_.half_first),
        weight_dims_(exchange_ ? exchanged(d_) : d_),
        weight_plan_(exchange_ ? turned_plan_ : plan_),
        most_(in.most_slots()) {
    if (in.dx != nullptr || (wanted_.weight() && exchange_))
      turned_panels_ = pack_central<T>(gemm, exchanged(d_), in.central, turned_plan_, true);
    if (wanted_.weight() && !exchange_)
      own_panels_ = pack_central<T>(gemm, d_, in.central, plan_);
    if (wanted_.left)
      inverse_panels_ = turn_central<T>(gemm, weight_dims_, exchange_, in.central, weight_plan_);
    plan_groups();
  }

  void run() {
    RowGradients<T> gradients(in_, true);
    T* dx = in_.dx == nullptr ? nullptr : gradients.row(0);
    const int64_t groups = std::ssize(groups_);
    parallel_for_each(groups, 1, [&](int64_t g) { run_group(g, dx); });
    if (wanted_.central)
      store_central<T>(
          gemm_, in_, weight_dims_, exchange_, weight_plan_, groups, central_sums_.get());
    if (in_.dbias != nullptr) {
      for (int64_t g = 1; g < groups; ++g)
        for (int64_t c = 0; c < d_.out_features; ++c)
          bias_sums_[c] += bias_sums_[g * d_.out_features + c];
      gemm_.round_row(bias_sums_.data(), in_.dbias, d_.out_features);
    }
    gradients.finish(gemm_);
  }

 private:
  void plan_groups() {
    const int64_t size = ceil_divide(d_.iC * d_.jC * plan_.b, kPanel) * d_.a * kPanel;
    const int64_t count = std::min(most_groups<T>(d_, size), in_.experts);
    for (int64_t g = 0; g < count; ++g)
      groups_.push_back({in_.experts * g / count, in_.experts * (g + 1) / count});
    if (wanted_.central)
      central_sums_ = zeros<float>(count * size);
    central_size_ = size;
    if (in_.dbias != nullptr)
      bias_sums_.assign(count * d_.out_features, 0.0f);
  }

  void run_group(int64_t group, T* dx) {
    OneExpert<T> turned(in_, true);
    OneExpert<T> own(in_, exchange_);
    std::unique_ptr<HalfFirst<T>> x_half;
    std::unique_ptr<RightFirst<T>> x_right;
    std::unique_ptr<HalfGradient<T>> weights;
    if (dx != nullptr && turned_plan_.half_first)
      x_half = std::make_unique<HalfFirst<T>>(gemm_, turned.in, turned_plan_, turned_panels_.get());
    else if (dx != nullptr)
      x_right = std::make_unique<RightFirst<T>>(
          gemm_, turned.in, turned_plan_, turned_panels_.get(), most_);
    if (wanted_.weight())
      weights = std::make_unique<HalfGradient<T>>(
          gemm_,
          own.in,
          weight_plan_,
          exchange_ ? turned_panels_.get() : own_panels_.get(),
          inverse_panels_.get(),
          wanted_,
          wanted_.central ? central_sums_.get() + group * central_size_ : nullptr);
    Buffer<T> gradient(in_.activation == Activation::kNone ? 0 : most_ * d_.out_features);
    Buffer<T> gathered(exchange_ && in_.row_index != nullptr ? most_ * d_.in_features : 0);
    for (int64_t e = groups_[group].first; e < groups_[group].last; ++e) {
      const int64_t first = in_.offsets[e], count = in_.count(e);
      if (count == 0) {
        zero_blocks<T>(in_, e);
        continue;
      }
      const T* dz = gradient_rows(first, count, gradient.get());
      if (in_.dbias != nullptr)
        for (int64_t t = 0; t < count; ++t)
          gemm_.add_row(dz + t * d_.out_features,
                        bias_sums_.data() + group * d_.out_features,
                        d_.out_features);
      if (dx != nullptr) {
        turned.load(gemm_, in_, e);
        turned.offsets[1] = count;
        turned.in.x = dz;
        turned.in.y = dx + first * d_.in_features;
        if (x_half)
          x_half->run(0);
        if (x_right)
          x_right->run(0);
      }
      if (!weights)
        continue;
      own.load(gemm_, in_, e);
      run_weights(*weights, own, e, first, count, dz, gathered.get());
    }
  }

  const T* gradient_rows(int64_t first, int64_t count, T* out) const {
    const int64_t width = d_.out_features;
    const T* grad = static_cast<const T*>(in_.grad) + first * width;
    if (in_.activation == Activation::kNone)
      return grad;
    gemm_.activation_backward(
        in_.activation, grad, static_cast<const T*>(in_.saved) + first * width, out, count * width);
    return out;
  }

  void run_weights(HalfGradient<T>& weights,
                   OneExpert<T>& own,
                   int64_t expert,
                   int64_t first,
                   int64_t count,
                   const T* dz,
                   T* gathered) const {
    T* left = static_cast<T*>(in_.dleft) + (wanted_.left ? expert * d_.left_size() : 0);
    T* right = static_cast<T*>(in_.dright) + (wanted_.right ? expert * d_.right_size() : 0);
    if (!exchange_) {
      weights.run(
          first,
          count,
          dz,
          [&](int64_t i, int64_t j) { return left + (i * d_.jL + j) * d_.a; },
          [&](int64_t b, int64_t r) { return right + (b * d_.iR + r) * d_.jR; },
          1);
      return;
    }
    const T* x = static_cast<const T*>(in_.x) + first * d_.in_features;
    if (in_.row_index != nullptr) {
      for (int64_t t = 0; t < count; ++t)
        std::memcpy(
            gathered + t * d_.in_features, row_of<T>(in_, first + t), d_.in_features * sizeof(T));
      x = gathered;
    }
    own.in.x = dz;
    weights.run(
        0,
        count,
        x,
        [&](int64_t j, int64_t i) { return left + (i * d_.jL + j) * d_.a; },
        [&](int64_t b, int64_t c) { return right + b * d_.iR * d_.jR + c; },
        d_.jR);
  }

  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const BlockDims& d_;
  HalfPlan plan_, turned_plan_;
  Wanted wanted_;
  bool exchange_;  // the gradients of blocks are those of the exchanged problem
  BlockDims weight_dims_;
  HalfPlan weight_plan_;
  const int64_t most_;  // slots of an expert
  int64_t central_size_ = 0;
  Buffer<T> turned_panels_, own_panels_, inverse_panels_;
  std::vector<Span> groups_;  // of experts
  Buffer<float> central_sums_;
  std::vector<float> bias_sums_;  // [group, F]
};

}  // namespace

void half_left_backward(const LinearBackward& in) {
  with_element_type(in.dtype,
                    [&]<class T>(const GemmKernels& gemm, T) { Backward<T>(gemm, in).run(); });
}

}  // namespace mpoe
