// Backward of half_left, expert by expert. dx = dz W^T is the forward with the sides of the blocks exchanged (`Turned`). The
// gradients of the blocks never build that of W: with u = x LC and du = dz right^T,
//   dright = u^T dz,   dLC = x^T du,   dleft = dLC central^T,   dcentral += left^T dLC
// in the order that meets LC first; for a shape where right comes first, those of the exchanged blocks.
// Experts are cut into groups whose number does not depend on that of threads; dcentral and dbias are summed within a group
// in the order of experts, then over groups.
#include <memory>

#include "cpu/linear_gradient.h"
#include "cpu/linear_half.h"

namespace mpoe {
namespace {

constexpr std::int64_t kMostGroups = 8;

BlockDims exchanged(const BlockDims& d) {
  return {d.jL, d.iL, d.a, d.jC, d.iC, d.b, d.jR, d.iR, d.out_features, d.in_features};
}

// central [a, jC, iC, b] of the exchanged blocks.
template <class T>
Buffer<T> exchange_central(const LinearInputs& in) {
  const BlockDims& d = in.dims;
  Buffer<T> out(d.a * d.iC * d.jC * d.b);
  const T* from = static_cast<const T*>(in.central);
  for (std::int64_t a = 0; a < d.a; ++a)
    for (std::int64_t i = 0; i < d.iC; ++i)
      for (std::int64_t j = 0; j < d.jC; ++j)
        std::memcpy(
            out.get() + ((a * d.jC + j) * d.iC + i) * d.b, from + ((a * d.iC + i) * d.jC + j) * d.b, d.b * sizeof(T));
  return out;
}

// One expert of a problem, possibly with sides exchanged, as an argument of the forward's classes.
template <class T>
struct OneExpert {
  LinearForward in{};
  std::int64_t offsets[2] = {0, 0};
  Buffer<T> left, right;  // exchanged copies

  OneExpert(const LinearBackward& full, bool exchange, const T* central, bool copy) {
    static_cast<LinearInputs&>(in) = full;
    in.activation = Activation::kNone;
    in.experts = 1;
    in.offsets = offsets;
    in.central = central;
    if (!exchange) return;
    in.dims = exchanged(full.dims);
    in.row_index = nullptr;
    if (copy) {
      left = Buffer<T>(in.dims.iL * in.dims.jL * in.dims.a);
      right = Buffer<T>(in.dims.b * in.dims.iR * in.dims.jR);
      in.left = left.get();
      in.right = right.get();
    }
  }

  // Blocks of one expert in this problem's order.
  void load(const GemmKernels& gemm, const LinearBackward& full, std::int64_t expert) {
    const BlockDims& d = full.dims;
    const T* from_left = static_cast<const T*>(full.left) + expert * d.iL * d.jL * d.a;
    const T* from_right = static_cast<const T*>(full.right) + expert * d.b * d.iR * d.jR;
    if (!left) {
      in.left = from_left;
      in.right = from_right;
      return;
    }
    for (std::int64_t i = 0; i < d.iL; ++i)
      for (std::int64_t j = 0; j < d.jL; ++j)
        std::memcpy(left.get() + (j * d.iL + i) * d.a, from_left + (i * d.jL + j) * d.a, d.a * sizeof(T));
    for (std::int64_t b = 0; b < d.b; ++b)
      gemm.transpose(
          from_right + b * d.iR * d.jR, d.jR, d.iR, d.jR, right.get() + b * d.iR * d.jR, d.iR);
  }
};

// Gradients of one expert's blocks after another, in the order that meets LC first.
template <class T>
class HalfGradient : public HalfFirst<T> {
  using Base = HalfFirst<T>;
  using Base::chunk_, Base::d_, Base::gemm_, Base::in_, Base::left_, Base::left_rows_, Base::left_stride_, Base::plan_,
      Base::rows_, Base::u_, Base::u_stride_;

 public:
  // `central_turned`: panels of central^T, columns a, inner (iC jC b) with b in whole granules.
  HalfGradient(
      const GemmKernels& gemm, const LinearForward& in, const HalfPlan& plan, const T* central, const T* central_turned,
      Wanted wanted, float* central_sums)
      : Base(gemm, in, plan, central), wanted_(wanted), central_turned_(central_turned), central_sums_(central_sums),
        z_stride_(padded_k(gemm, d_.jR)), r_units_(ceil_divide(d_.iR, gemm.unit)),
        x_stride_(row_stride(gemm, rows_ * r_units_ * gemm.unit)), inner_(d_.iC * d_.jC * plan.b),
        dhalf_stride_(row_stride(gemm, inner_)), left_turned_stride_(row_stride(gemm, d_.jL * left_rows_)),
        right_rows_(round_up(d_.iR * plan.b, kPanel)), columns_(gemm.unit, d_.iR, d_.jR * plan.b, d_.b) {
    const std::int64_t pairs = chunk_ * d_.jC, unit = gemm.unit;
    z_ = Buffer<T>(rows_ * pairs * z_stride_);
    const std::int64_t k_units = ceil_divide(rows_ * pairs, unit);
    if (wanted_.right) {
      u_panels_ = Buffer<T>(right_rows_ * k_units * unit);
      z_panels_ = Buffer<T>(round_up(d_.jR, kPanel) * k_units * unit);
      right_sums_ = Buffer<float>(right_rows_ * round_up(d_.jR, kPanel));
    }
    if (!wanted_.half()) return;
    du_ = zeros<T>(chunk_ * plan.central_panels * rows_ * r_units_ * kPanel * unit);
    turned_ = Buffer<T>(d_.iR * d_.jR * plan.b);
    right_panels_ = Buffer<T>(columns_.panels * z_stride_ * kPanel);
    x_rows_ = zeros<T>(d_.iC * left_rows_ * x_stride_);
    half_sums_ = Buffer<float>(chunk_ * plan.central_panels * d_.iC * left_rows_ * kPanel);
    dhalf_ = Buffer<T>(chunk_ * left_rows_ * dhalf_stride_);
    if (wanted_.central) {
      left_turned_ = Buffer<T>(d_.a * left_turned_stride_);
      dhalf_panels_ = Buffer<T>(round_up(inner_, kPanel) * chunk_ * left_rows_);
    }
    for (std::int64_t i = 0; i < d_.iC; ++i)
      for (std::int64_t l = 0; l < left_rows_; ++l)
        dhalf_row_.push_back(l * dhalf_stride_ + i * d_.jC * plan.b);
    const std::int64_t granules = plan.b / kGranule;
    for (std::int64_t row = 0; row < pairs; ++row)
      for (std::int64_t g = 0; g < granules; ++g) {
        const std::int64_t column = row % d_.jC * plan.b + g * kGranule;
        const std::int64_t panel = row / d_.jC * plan.central_panels + column / kPanel;
        du_place_.push_back(
            static_cast<std::int32_t>(panel * rows_ * r_units_ * kPanel + column % kPanel));
      }
  }

  // Slots 0.. of `in`, with their gradients dz [count, F]. dleft(iL, jL) and dright(b, iR) say where rows of the results
  // go; the elements of one of dright are `right_step` apart.
  template <class LeftPlace, class RightPlace>
  void run(
      std::int64_t first, std::int64_t count, const T* dz, const LeftPlace& dleft, const RightPlace& dright,
      std::int64_t right_step) {
    Base::load(0);
    load_gradient_blocks();
    for (std::int64_t j = 0; j < d_.jL; j += chunk_) {
      const std::int64_t lefts = std::min(chunk_, d_.jL - j);
      if (wanted_.right) {
        Base::build(j, lefts);
        Base::place_rows(lefts);
      }
      for (std::int64_t t = 0; t < count; t += rows_) {
        const std::int64_t rows = std::min(rows_, count - t);
        load_gradient(dz + t * d_.out_features, rows, j, lefts);
        if (wanted_.right) {
          Base::arrange(first + t, rows);
          Base::meet_half(rows, lefts);
          right_gradient(rows * lefts * d_.jC, j > 0 || t > 0);
        }
        if (wanted_.half()) {
          turn_rows(first + t, rows);
          half_rows(rows, lefts);
          rows_times_panels(
              gemm_, d_.iC * left_rows_, rows * r_units_, x_rows_.get(), x_stride_, du_.get(), rows_ * r_units_,
              lefts * plan_.central_panels, half_sums_.get(), d_.iC * left_rows_, t > 0);
        }
      }
      if (wanted_.half()) project(j, lefts, dleft);
    }
    if (wanted_.right) store_right(dright, right_step);
  }

 private:
  void load_gradient_blocks() {
    if (wanted_.central)
      gemm_.transpose(
          left_.get(), left_stride_, d_.jL * left_rows_, d_.a, left_turned_.get(), left_turned_stride_);
    if (!wanted_.half()) return;
    const std::int64_t pairs = d_.iR * d_.jR;
    gemm_.transpose(in_.right, pairs, d_.b, pairs, turned_.get(), plan_.b);
    for (std::int64_t p = 0; p < columns_.panels; ++p)
      gemm_.pack_granules(right_panels_.get() + p * z_stride_ * kPanel, turned_.get(), plan_.b, d_.jR, columns_.map[p]);
  }

  // z [t, (jL jC) of the chunk, jR in whole units], zero past the true size.
  void load_gradient(const T* dz, std::int64_t rows, std::int64_t j, std::int64_t lefts) {
    T* out = z_.get();
    for (std::int64_t t = 0; t < rows; ++t)
      for (std::int64_t c = j * d_.jC; c < (j + lefts) * d_.jC; ++c, out += z_stride_) {
        const std::int64_t valid = std::clamp<std::int64_t>(d_.out_features - c * d_.jR, 0, d_.jR);
        std::memcpy(out, dz + t * d_.out_features + (valid > 0 ? c * d_.jR : 0), valid * sizeof(T));
        std::fill(out + valid, out + z_stride_, T{});
      }
  }

  // right_sums [panels of jR, (iR b), 32] (+)= u^T z
  void right_gradient(std::int64_t k, bool accumulate) {
    const std::int64_t units = ceil_divide(k, gemm_.unit);
    gemm_.pack(u_panels_.get(), units, u_.get(), u_stride_, k, d_.iR * plan_.b);
    gemm_.pack(z_panels_.get(), units, z_.get(), z_stride_, k, d_.jR);
    for_column_tiles(
        gemm_, d_.iR * plan_.b, units, u_panels_.get(), ceil_divide(d_.jR, kPanel),
        [&](const T* columns, std::int64_t first, std::int64_t count, std::int64_t p) {
          multiply_columns(
              gemm_, count, units, columns, z_panels_.get() + p * units * kPanel * gemm_.unit,
              right_sums_.get() + (p * right_rows_ + first) * kPanel, accumulate);
        });
  }

  // x [(iC iL), (t iR)]
  void turn_rows(std::int64_t first, std::int64_t rows) {
    const std::int64_t width = r_units_ * gemm_.unit;
    for (std::int64_t t = 0; t < rows; ++t) {
      const T* row = row_of<T>(in_, first + t);
      for (std::int64_t l = 0; l < d_.iL; ++l)
        for (std::int64_t i = 0; i < d_.iC; ++i) {
          T* out = x_rows_.get() + (i * left_rows_ + l) * x_stride_ + t * width;
          const std::int64_t from = (l * d_.iC + i) * d_.iR;
          const std::int64_t valid = std::clamp<std::int64_t>(d_.in_features - from, 0, d_.iR);
          std::memcpy(out, row + (valid > 0 ? from : 0), valid * sizeof(T));
          std::fill(out + valid, out + width, T{});
        }
    }
  }

  // du [(jL, jC b) as panels, (t iR) in units]
  void half_rows(std::int64_t rows, std::int64_t lefts) {
    alignas(64) float tile[kMaxRows * kPanel];
    const std::int64_t pairs = lefts * d_.jC, granules = plan_.b / kGranule, units = z_stride_ / gemm_.unit;
    for (std::int64_t t = 0; t < rows; ++t) {
      T* out = du_.get() + t * r_units_ * kPanel * gemm_.unit;
      for_each_tile(pairs, gemm_.best_rows, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t p = 0; p < columns_.panels; ++p) {
          multiply_rows(
              gemm_, count, units, z_.get() + (t * pairs + first) * z_stride_, z_stride_,
              right_panels_.get() + p * z_stride_ * kPanel, tile, false);
          gemm_.store_units(
              tile, count, out, du_place_.data() + first * granules, granules,
              columns_.which.data() + p * columns_.per_panel, columns_.unit_offset.data() + p * columns_.per_panel);
        }
      });
    }
  }

  // dleft of the chunk, and its part of dcentral.
  template <class LeftPlace>
  void project(std::int64_t j, std::int64_t lefts, const LeftPlace& dleft) {
    const std::int64_t rows = d_.iC * left_rows_;
    for (std::int64_t c = 0; c < lefts; ++c)
      for (std::int64_t p = 0; p < plan_.central_panels; ++p)
        gemm_.finish(
            half_sums_.get() + (c * plan_.central_panels + p) * rows * kPanel, rows,
            dhalf_.get() + c * left_rows_ * dhalf_stride_, dhalf_row_.data(), 0,
            consecutive(p * kPanel, d_.jC * plan_.b), Finish{});
    if (wanted_.left) {
      alignas(64) float tile[kMaxRows * kPanel];
      std::int64_t place[kMaxRows];
      const std::int64_t units = inner_ / gemm_.unit;
      for (std::int64_t c = 0; c < lefts; ++c)
        for_each_tile(d_.iL, gemm_.best_rows, [&](std::int64_t first, std::int64_t count) {
          T* out = dleft(0, 0);
          for (std::int64_t r = 0; r < count; ++r) place[r] = dleft(first + r, j + c) - out;
          for (std::int64_t a = 0; a < d_.a; a += kPanel) {
            multiply_rows(
                gemm_, count, units, dhalf_.get() + (c * left_rows_ + first) * dhalf_stride_, dhalf_stride_,
                central_turned_ + a * units * gemm_.unit, tile, false);
            gemm_.finish(tile, count, out, place, 0, consecutive(a, d_.a), Finish{});
          }
        });
    }
    if (wanted_.central) {
      const std::int64_t k = lefts * left_rows_;
      gemm_.pack(dhalf_panels_.get(), k / gemm_.unit, dhalf_.get(), dhalf_stride_, k, inner_);
      rows_times_panels(
          gemm_, d_.a, k / gemm_.unit, left_turned_.get() + j * left_rows_, left_turned_stride_, dhalf_panels_.get(),
          k / gemm_.unit, ceil_divide(inner_, kPanel), central_sums_, d_.a, true);
    }
  }

  template <class RightPlace>
  void store_right(const RightPlace& dright, std::int64_t step) {
    for (std::int64_t b = 0; b < d_.b; ++b)
      for (std::int64_t r = 0; r < d_.iR; ++r) {
        T* out = dright(b, r);
        for (std::int64_t c = 0; c < d_.jR; ++c)
          store(
              out[c * step],
              right_sums_.get()[(c / kPanel * right_rows_ + r * plan_.b + b) * kPanel + c % kPanel]);
      }
  }

  Wanted wanted_;
  const T* central_turned_;
  float* central_sums_;  // [panels of (iC jC b), a, 32]
  std::int64_t z_stride_, r_units_, x_stride_, inner_, dhalf_stride_, left_turned_stride_, right_rows_;
  UnitColumns columns_;  // (iR, b) of right, exchanged
  Buffer<T> z_, u_panels_, z_panels_, du_, turned_, right_panels_, x_rows_, dhalf_, left_turned_, dhalf_panels_;
  Buffer<float> right_sums_, half_sums_;
  std::vector<std::int64_t> dhalf_row_;
  std::vector<std::int32_t> du_place_;
};

// Panels of central^T: columns a, inner (iC jC b) with b in whole granules.
template <class T>
Buffer<T> turn_central(const GemmKernels& gemm, const BlockDims& d, const T* central, const HalfPlan& plan) {
  const std::int64_t pairs = d.iC * d.jC, inner = pairs * plan.b;
  Buffer<T> panels(round_up(d.a, kPanel) * inner);
  if (plan.b == d.b) {
    gemm.pack_transposed(panels.get(), inner / gemm.unit, central, inner, inner, d.a);
    return panels;
  }
  Buffer<T> padded = zeros<T>(d.a * inner);
  for (std::int64_t row = 0; row < d.a * pairs; ++row)
    std::memcpy(padded.get() + row * plan.b, central + row * d.b, d.b * sizeof(T));
  gemm.pack_transposed(panels.get(), inner / gemm.unit, padded.get(), inner, inner, d.a);
  return panels;
}

// dcentral from sums [group, panels of (iC jC b), a, 32] of the possibly exchanged problem `d`.
template <class T>
void store_central(
    const LinearBackward& in, const BlockDims& d, bool exchange, const HalfPlan& plan, std::int64_t groups, float* sums) {
  const std::int64_t size = ceil_divide(d.iC * d.jC * plan.b, kPanel) * d.a * kPanel;
  parallel_for(0, d.a, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t a = begin; a < end; ++a)
      for (std::int64_t i = 0; i < d.iC; ++i)
        for (std::int64_t j = 0; j < d.jC; ++j) {
          const std::int64_t pair = exchange ? j * d.iC + i : i * d.jC + j;
          T* out = static_cast<T*>(in.dcentral) + (a * d.iC * d.jC + pair) * d.b;
          for (std::int64_t b = 0; b < d.b; ++b) {
            const std::int64_t column = (i * d.jC + j) * plan.b + b;
            float sum = 0;
            for (std::int64_t g = 0; g < groups; ++g)
              sum += sums[g * size + (column / kPanel * d.a + a) * kPanel + column % kPanel];
            store(out[b], sum);
          }
        }
  });
}

// Everything that the groups of experts share and fill.
template <class T>
class Backward {
 public:
  Backward(const GemmKernels& gemm, const LinearBackward& in)
      : gemm_(gemm), in_(in), d_(in.dims), plan_(gemm, in.dims), turned_plan_(gemm, exchanged(in.dims)),
        wanted_(in), exchange_(!plan_.half_first),
        weight_dims_(exchange_ ? exchanged(d_) : d_), weight_plan_(exchange_ ? turned_plan_ : plan_) {
    for (std::int64_t e = 0; e < in.experts; ++e) most_ = std::max(most_, in.offsets[e + 1] - in.offsets[e]);
    const T* central = static_cast<const T*>(in.central);
    if (in.dx != nullptr || exchange_) {
      turned_central_ = exchange_central<T>(in);
      turned_panels_ = pack_central<T>(gemm, turned_inputs(), turned_plan_);
    }
    weight_central_ = exchange_ ? turned_central_.get() : central;
    if (wanted_.weight() && !exchange_) own_panels_ = pack_central<T>(gemm, in, plan_);
    if (wanted_.left) inverse_panels_ = turn_central<T>(gemm, weight_dims_, weight_central_, weight_plan_);
    plan_groups();
  }

  void run() {
    RowGradients<T> gradients(in_, true);
    T* dx = in_.dx == nullptr ? nullptr : gradients.row(0);
    const std::int64_t groups = static_cast<std::int64_t>(groups_.size());
    parallel_for(0, groups, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t g = begin; g < end; ++g) run_group(g, dx);
    });
    if (wanted_.central)
      store_central<T>(in_, weight_dims_, exchange_, weight_plan_, groups, central_sums_.get());
    if (in_.dbias != nullptr) {
      for (std::int64_t g = 1; g < groups; ++g)
        for (std::int64_t c = 0; c < d_.out_features; ++c) bias_sums_[c] += bias_sums_[g * d_.out_features + c];
      gemm_.round_row(bias_sums_.data(), in_.dbias, d_.out_features);
    }
    gradients.finish(gemm_);
  }

 private:
  LinearInputs turned_inputs() const {
    LinearInputs turned = in_;
    turned.dims = exchanged(d_);
    turned.central = turned_central_.get();
    return turned;
  }

  // As many groups as their sums of dcentral may take memory: two weights at most.
  void plan_groups() {
    const std::int64_t size = ceil_divide(d_.iC * d_.jC * plan_.b, kPanel) * d_.a * kPanel;
    const std::int64_t room = 2 * d_.padded_in() * d_.padded_out() * static_cast<std::int64_t>(sizeof(T)) / (size * 4);
    const std::int64_t count = std::clamp<std::int64_t>(std::min(room, in_.experts), 1, kMostGroups);
    for (std::int64_t g = 0; g < count; ++g) groups_.push_back({in_.experts * g / count, in_.experts * (g + 1) / count});
    if (wanted_.central) central_sums_ = zeros<float>(count * size);
    central_size_ = size;
    if (in_.dbias != nullptr) bias_sums_.assign(count * d_.out_features, 0.0f);
  }

  void run_group(std::int64_t group, T* dx) {
    OneExpert<T> turned(in_, true, turned_central_.get(), true);
    OneExpert<T> own(in_, exchange_, weight_central_, exchange_);
    std::unique_ptr<HalfFirst<T>> x_half;
    std::unique_ptr<RightFirst<T>> x_right;
    std::unique_ptr<HalfGradient<T>> weights;
    if (dx != nullptr && turned_plan_.half_first)
      x_half = std::make_unique<HalfFirst<T>>(gemm_, turned.in, turned_plan_, turned_panels_.get());
    else if (dx != nullptr)
      x_right = std::make_unique<RightFirst<T>>(gemm_, turned.in, turned_plan_, turned_panels_.get(), most_);
    if (wanted_.weight())
      weights = std::make_unique<HalfGradient<T>>(
          gemm_, own.in, weight_plan_, exchange_ ? turned_panels_.get() : own_panels_.get(), inverse_panels_.get(),
          wanted_, wanted_.central ? central_sums_.get() + group * central_size_ : nullptr);
    Buffer<T> gradient(in_.activation == Activation::kNone ? 0 : most_ * d_.out_features);
    Buffer<T> gathered(exchange_ && in_.row_index != nullptr ? most_ * d_.in_features : 0);
    for (std::int64_t e = groups_[group].first; e < groups_[group].last; ++e) {
      const std::int64_t first = in_.offsets[e], count = in_.offsets[e + 1] - first;
      if (count == 0) {
        zero_rows(in_.dleft, e, e + 1, d_.iL * d_.jL * d_.a * sizeof(T));
        zero_rows(in_.dright, e, e + 1, d_.b * d_.iR * d_.jR * sizeof(T));
        continue;
      }
      const T* dz = gradient_rows(first, count, gradient.get());
      if (in_.dbias != nullptr)
        for (std::int64_t t = 0; t < count; ++t)
          gemm_.add_row(
              dz + t * d_.out_features, bias_sums_.data() + group * d_.out_features,
              d_.out_features);
      if (dx != nullptr) {
        turned.load(gemm_, in_, e);
        turned.offsets[1] = count;
        turned.in.x = dz;
        turned.in.y = dx + first * d_.in_features;
        if (x_half) x_half->run(0);
        if (x_right) x_right->run(0);
      }
      if (!weights) continue;
      own.load(gemm_, in_, e);
      run_weights(*weights, own, e, first, count, dz, gathered.get());
    }
  }

  const T* gradient_rows(std::int64_t first, std::int64_t count, T* out) const {
    const std::int64_t width = d_.out_features;
    const T* grad = static_cast<const T*>(in_.grad) + first * width;
    if (in_.activation == Activation::kNone) return grad;
    gemm_.activation_backward(
        in_.activation, grad, static_cast<const T*>(in_.saved) + first * width, out, count * width);
    return out;
  }

  void run_weights(
      HalfGradient<T>& weights, OneExpert<T>& own, std::int64_t expert, std::int64_t first, std::int64_t count,
      const T* dz, T* gathered) const {
    T* left = static_cast<T*>(in_.dleft) + (wanted_.left ? expert * d_.iL * d_.jL * d_.a : 0);
    T* right = static_cast<T*>(in_.dright) + (wanted_.right ? expert * d_.b * d_.iR * d_.jR : 0);
    if (!exchange_) {
      weights.run(
          first, count, dz, [&](std::int64_t i, std::int64_t j) { return left + (i * d_.jL + j) * d_.a; },
          [&](std::int64_t b, std::int64_t r) { return right + (b * d_.iR + r) * d_.jR; }, 1);
      return;
    }
    const T* x = static_cast<const T*>(in_.x) + first * d_.in_features;
    if (in_.row_index != nullptr) {
      for (std::int64_t t = 0; t < count; ++t)
        std::memcpy(gathered + t * d_.in_features, row_of<T>(in_, first + t), d_.in_features * sizeof(T));
      x = gathered;
    }
    own.in.x = dz;
    weights.run(
        0, count, x, [&](std::int64_t j, std::int64_t i) { return left + (i * d_.jL + j) * d_.a; },
        [&](std::int64_t b, std::int64_t c) { return right + b * d_.iR * d_.jR + c; }, d_.jR);
  }

  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const BlockDims& d_;
  HalfPlan plan_, turned_plan_;
  Wanted wanted_;
  bool exchange_;  // the gradients of blocks are those of the exchanged problem
  BlockDims weight_dims_;
  HalfPlan weight_plan_;
  std::int64_t most_ = 0, central_size_ = 0;
  Buffer<T> turned_central_, turned_panels_, own_panels_, inverse_panels_;
  const T* weight_central_ = nullptr;
  std::vector<Span> groups_;  // of experts
  Buffer<float> central_sums_;
  std::vector<float> bias_sums_;  // [group, F]
};

}  // namespace

void half_left_backward(const LinearBackward& in) {
  const GemmKernels& gemm = gemm_kernels(in.dtype);
  if (in.dtype == Dtype::kBFloat16)
    Backward<BFloat16>(gemm, in).run();
  else
    Backward<float>(gemm, in).run();
}

}  // namespace mpoe
