// Block gradients of half_left for one expert, in the order that multiplies by LC first
// (half_backward.cpp).
#pragma once

#include "cpu/linear/gradient.h"
#include "cpu/linear/half.h"

namespace mpoe {

// Computes the gradients of blocks, one expert at a time, in the order that multiplies by LC first.
template <class T>
class HalfGradient : public HalfFirst<T> {
  using Base = HalfFirst<T>;
  using Base::chunk_, Base::d_, Base::gemm_, Base::in_, Base::left_, Base::left_rows_,
      Base::left_stride_, Base::plan_, Base::rows_, Base::u_, Base::u_stride_;

 public:
  // `central_turned`: panels of central^T, columns a, inner (iC jC b) with b in whole granules.
  HalfGradient(const GemmKernels& gemm,
               const LinearForward& in,
               const HalfPlan& plan,
               const T* central,
               const T* central_turned,
               Wanted wanted,
               float* central_sums)
      : Base(gemm, in, plan, central),
        wanted_(wanted),
        central_turned_(central_turned),
        central_sums_(central_sums),
        z_stride_(padded_k(gemm, d_.jR)),
        r_units_(ceil_divide(d_.iR, gemm.unit)),
        x_stride_(row_stride(gemm, rows_ * r_units_ * gemm.unit)),
        inner_(d_.iC * d_.jC * plan.b),
        dhalf_stride_(row_stride(gemm, inner_)),
        left_turned_stride_(row_stride(gemm, d_.jL * left_rows_)),
        right_rows_(round_up(d_.iR * plan.b, kPanel)),
        columns_(gemm.unit, d_.iR, d_.jR * plan.b, d_.b) {
    const std::int64_t pairs = chunk_ * d_.jC, unit = gemm.unit;
    z_ = Buffer<T>(rows_ * pairs * z_stride_);
    const std::int64_t k_units = ceil_divide(rows_ * pairs, unit);
    if (wanted_.right) {
      u_panels_ = Buffer<T>(right_rows_ * k_units * unit);
      z_panels_ = Buffer<T>(round_up(d_.jR, kPanel) * k_units * unit);
      right_sums_ = Buffer<float>(right_rows_ * round_up(d_.jR, kPanel));
    }
    if (!wanted_.half())
      return;
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

  // `count` slots of `in` from `first` on, with their gradients dz [count, F]. dleft(iL, jL) and
  // dright(b, iR) return where rows of the results go; the elements of a row of dright are
  // `right_step` apart.
  template <class LeftPlace, class RightPlace>
  void run(std::int64_t first,
           std::int64_t count,
           const T* dz,
           const LeftPlace& dleft,
           const RightPlace& dright,
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
          rows_times_panels(gemm_,
                            d_.iC * left_rows_,
                            rows * r_units_,
                            x_rows_.get(),
                            x_stride_,
                            du_.get(),
                            rows_ * r_units_,
                            lefts * plan_.central_panels,
                            half_sums_.get(),
                            d_.iC * left_rows_,
                            t > 0);
        }
      }
      if (wanted_.half())
        project(j, lefts, dleft);
    }
    if (wanted_.right)
      store_right(dright, right_step);
  }

 private:
  void load_gradient_blocks() {
    if (wanted_.central)
      gemm_.transpose(left_.get(),
                      left_stride_,
                      d_.jL * left_rows_,
                      d_.a,
                      left_turned_.get(),
                      left_turned_stride_);
    if (!wanted_.half())
      return;
    const std::int64_t pairs = d_.iR * d_.jR;
    gemm_.transpose(in_.right, pairs, d_.b, pairs, turned_.get(), plan_.b);
    for (std::int64_t p = 0; p < columns_.panels; ++p)
      gemm_.pack_granules(right_panels_.get() + p * z_stride_ * kPanel,
                          turned_.get(),
                          plan_.b,
                          d_.jR,
                          columns_.map[p]);
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
    for_column_tiles(gemm_,
                     d_.iR * plan_.b,
                     units,
                     u_panels_.get(),
                     ceil_divide(d_.jR, kPanel),
                     [&](const T* columns, std::int64_t first, std::int64_t count, std::int64_t p) {
                       multiply_columns(gemm_,
                                        count,
                                        units,
                                        columns,
                                        z_panels_.get() + p * units * kPanel * gemm_.unit,
                                        right_sums_.get() + (p * right_rows_ + first) * kPanel,
                                        kPanel,
                                        accumulate);
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
    const std::int64_t pairs = lefts * d_.jC, granules = plan_.b / kGranule,
                       units = z_stride_ / gemm_.unit;
    for (std::int64_t t = 0; t < rows; ++t) {
      T* out = du_.get() + t * r_units_ * kPanel * gemm_.unit;
      for_each_tile(pairs, gemm_.best_rows, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t p = 0; p < columns_.panels; ++p) {
          multiply_rows(gemm_,
                        count,
                        units,
                        z_.get() + (t * pairs + first) * z_stride_,
                        z_stride_,
                        right_panels_.get() + p * z_stride_ * kPanel,
                        tile,
                        false);
          gemm_.store_units(tile,
                            count,
                            out,
                            du_place_.data() + first * granules,
                            granules,
                            columns_.which.data() + p * columns_.per_panel,
                            columns_.unit_offset.data() + p * columns_.per_panel);
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
        gemm_.finish(half_sums_.get() + (c * plan_.central_panels + p) * rows * kPanel,
                     rows,
                     dhalf_.get() + c * left_rows_ * dhalf_stride_,
                     dhalf_row_.data(),
                     0,
                     consecutive(p * kPanel, d_.jC * plan_.b),
                     Finish{});
    if (wanted_.left) {
      alignas(64) float tile[kMaxRows * kPanel];
      std::int64_t place[kMaxRows];
      const std::int64_t units = inner_ / gemm_.unit;
      for (std::int64_t c = 0; c < lefts; ++c)
        for_each_tile(d_.iL, gemm_.best_rows, [&](std::int64_t first, std::int64_t count) {
          T* out = dleft(0, 0);
          for (std::int64_t r = 0; r < count; ++r)
            place[r] = dleft(first + r, j + c) - out;
          for (std::int64_t a = 0; a < d_.a; a += kPanel) {
            multiply_rows(gemm_,
                          count,
                          units,
                          dhalf_.get() + (c * left_rows_ + first) * dhalf_stride_,
                          dhalf_stride_,
                          central_turned_ + a * units * gemm_.unit,
                          tile,
                          false);
            gemm_.finish(tile, count, out, place, 0, consecutive(a, d_.a), Finish{});
          }
        });
    }
    if (wanted_.central) {
      const std::int64_t k = lefts * left_rows_;
      gemm_.pack(dhalf_panels_.get(), k / gemm_.unit, dhalf_.get(), dhalf_stride_, k, inner_);
      rows_times_panels(gemm_,
                        d_.a,
                        k / gemm_.unit,
                        left_turned_.get() + j * left_rows_,
                        left_turned_stride_,
                        dhalf_panels_.get(),
                        k / gemm_.unit,
                        ceil_divide(inner_, kPanel),
                        central_sums_,
                        d_.a,
                        true);
    }
  }

  template <class RightPlace>
  void store_right(const RightPlace& dright, std::int64_t step) {
    for (std::int64_t b = 0; b < d_.b; ++b)
      for (std::int64_t r = 0; r < d_.iR; ++r) {
        T* out = dright(b, r);
        for (std::int64_t c = 0; c < d_.jR; ++c)
          store(out[c * step],
                right_sums_
                    .get()[(c / kPanel * right_rows_ + r * plan_.b + b) * kPanel + c % kPanel]);
      }
  }

  Wanted wanted_;
  const T* central_turned_;
  float* central_sums_;  // [panels of (iC jC b), a, 32]
  std::int64_t z_stride_, r_units_, x_stride_, inner_, dhalf_stride_, left_turned_stride_,
      right_rows_;
  UnitColumns columns_;  // (iR, b) of right, exchanged
  Buffer<T> z_, u_panels_, z_panels_, du_, turned_, right_panels_, x_rows_, dhalf_, left_turned_,
      dhalf_panels_;
  Buffer<float> right_sums_, half_sums_;
  std::vector<std::int64_t> dhalf_row_;
  std::vector<std::int32_t> du_place_;
};

}  // namespace mpoe
