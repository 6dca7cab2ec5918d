// Block gradients of half_left for one expert, in the order that multiplies by LC first
// (half_backward.cpp).
#pragma once

#include "cpu/linear/gradient.h"
#include "cpu/linear/half.h"

namespace mpoe {

// Where the gradients of an expert's blocks go, and the elements between neighbours along an index:
// dleft (i, j, a) with a dense, dright (b, i, j). Null: not wanted.
template <class T>
struct BlockPlaces {
  T* left;
  int64_t left_i, left_j;
  T* right;
  int64_t right_b, right_i, right_j;
};

// Computes the gradients of blocks, one expert at a time.
template <class T>
class HalfGradient : public HalfFirst<T> {
  using Base = HalfFirst<T>;
  using Base::jL_chunk_, Base::d_, Base::gemm_, Base::in_, Base::left_, Base::left_rows_,
      Base::left_stride_, Base::plan_, Base::slots_, Base::u_, Base::u_stride_;

 public:
  // `central_transposed`: panels of central^T, columns a, inner (iC jC b) with b in whole granules.
  HalfGradient(const GemmKernels& gemm,
               const LinearForward& in,
               const HalfPlan& plan,
               const T* central,
               const T* central_transposed,
               Wanted wanted,
               float* central_sums)
      : Base(gemm, in, plan, central),
        wanted_(wanted),
        central_transposed_(central_transposed),
        central_sums_(central_sums),
        z_stride_(padded_k(gemm, d_.jR)),
        r_units_(ceil_divide(d_.iR, gemm.unit)),
        x_stride_(row_stride(gemm, slots_ * r_units_ * gemm.unit)),
        inner_(d_.iC * d_.jC * plan.b),
        dhalf_stride_(row_stride(gemm, inner_)),
        left_turned_stride_(row_stride(gemm, d_.jL * left_rows_)),
        right_rows_(round_up(d_.iR * plan.b, kPanel)),
        columns_(gemm.unit, d_.iR, d_.jR * plan.b, d_.b) {
    const int64_t pairs = jL_chunk_ * d_.jC, unit = gemm.unit;
    z_ = Buffer<T>(slots_ * pairs * z_stride_);
    const int64_t k_units = ceil_divide(slots_ * pairs, unit);
    if (wanted_.right) {
      u_panels_ = Buffer<T>(right_rows_ * k_units * unit);
      z_panels_ = Buffer<T>(round_up(d_.jR, kPanel) * k_units * unit);
      right_sums_ = Buffer<float>(right_rows_ * round_up(d_.jR, kPanel));
    }
    if (!wanted_.half())
      return;
    du_ = zeros<T>(jL_chunk_ * plan.central_panels * slots_ * r_units_ * kPanel * unit);
    turned_ = Buffer<T>(d_.iR * d_.jR * plan.b);
    right_panels_ = Buffer<T>(columns_.panels * z_stride_ * kPanel);
    x_rows_ = zeros<T>(d_.iC * left_rows_ * x_stride_);
    half_sums_ = Buffer<float>(jL_chunk_ * plan.central_panels * d_.iC * left_rows_ * kPanel);
    dhalf_ = Buffer<T>(jL_chunk_ * left_rows_ * dhalf_stride_);
    if (wanted_.central) {
      left_turned_ = Buffer<T>(d_.a * left_turned_stride_);
      dhalf_panels_ = Buffer<T>(round_up(inner_, kPanel) * jL_chunk_ * left_rows_);
    }
    for (int64_t i = 0; i < d_.iC; ++i)
      for (int64_t l = 0; l < left_rows_; ++l)
        dhalf_row_.push_back(l * dhalf_stride_ + i * d_.jC * plan.b);
    const int64_t granules = plan.b / kGranule;
    for (int64_t row = 0; row < pairs; ++row)
      for (int64_t g = 0; g < granules; ++g) {
        const int64_t column = row % d_.jC * plan.b + g * kGranule;
        const int64_t panel = row / d_.jC * plan.central_panels + column / kPanel;
        du_place_.push_back(
            static_cast<int32_t>(panel * slots_ * r_units_ * kPanel + column % kPanel));
      }
  }

  // `count` slots of `in` from `first` on, with their gradients [count, F]: `rows` are dz, or x if
  // the problem is an exchanged one.
  void run(int64_t first, int64_t count, const T* rows, const BlockPlaces<T>& places) {
    Base::load_blocks(0);
    load_gradient_blocks();
    for (int64_t j = 0; j < d_.jL; j += jL_chunk_) {
      const int64_t lefts = std::min(jL_chunk_, d_.jL - j);
      if (wanted_.right) {
        Base::build_half(j, lefts);
        Base::place_u_rows(lefts);
      }
      for (int64_t t = 0; t < count; t += slots_) {
        const int64_t slots = std::min(slots_, count - t);
        load_gradient(rows + t * d_.out_features, slots, j, lefts);
        if (wanted_.right) {
          Base::load_rows(first + t, slots);
          Base::rows_times_half(slots, lefts);
          right_gradient(slots * lefts * d_.jC, j > 0 || t > 0);
        }
        if (wanted_.half()) {
          turn_rows(first + t, slots);
          half_rows(slots, lefts);
          rows_times_panels(gemm_,
                            d_.iC * left_rows_,
                            slots * r_units_,
                            x_rows_.get(),
                            x_stride_,
                            du_.get(),
                            slots_ * r_units_,
                            lefts * plan_.central_panels,
                            half_sums_.get(),
                            d_.iC * left_rows_,
                            t > 0);
        }
      }
      if (wanted_.half())
        project(j, lefts, places);
    }
    if (wanted_.right)
      store_right(places);
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
    const int64_t pairs = d_.iR * d_.jR;
    gemm_.transpose(in_.right, pairs, d_.b, pairs, turned_.get(), plan_.b);
    columns_.pack(gemm_, turned_.get(), plan_.b, d_.jR, right_panels_.get());
  }

  // z [t, (jL jC) of the chunk, jR in whole units], zero past the true size.
  void load_gradient(const T* dz, int64_t rows, int64_t j, int64_t lefts) {
    T* out = z_.get();
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t c = j * d_.jC; c < (j + lefts) * d_.jC; ++c, out += z_stride_)
        copy_padded(dz + t * d_.out_features, d_.out_features, c * d_.jR, d_.jR, out, z_stride_);
  }

  // right_sums [panels of jR, (iR b), 32] (+)= u^T z
  void right_gradient(int64_t k, bool accumulate) {
    const int64_t units = ceil_divide(k, gemm_.unit);
    gemm_.pack(u_panels_.get(), units, u_.get(), u_stride_, k, d_.iR * plan_.b);
    gemm_.pack(z_panels_.get(), units, z_.get(), z_stride_, k, d_.jR);
    add_column_products(gemm_,
                        d_.iR * plan_.b,
                        units,
                        u_panels_.get(),
                        z_panels_.get(),
                        ceil_divide(d_.jR, kPanel),
                        right_sums_.get(),
                        kPanel,
                        right_rows_ * kPanel,
                        accumulate);
  }

  // x [(iC iL), (t iR)]
  void turn_rows(int64_t first, int64_t rows) {
    const int64_t width = r_units_ * gemm_.unit;
    for (int64_t t = 0; t < rows; ++t) {
      const T* row = row_of<T>(in_, first + t);
      for (int64_t l = 0; l < d_.iL; ++l)
        for (int64_t i = 0; i < d_.iC; ++i)
          copy_padded(row,
                      d_.in_features,
                      (l * d_.iC + i) * d_.iR,
                      d_.iR,
                      x_rows_.get() + (i * left_rows_ + l) * x_stride_ + t * width,
                      width);
    }
  }

  // du [(jL, jC b) as panels, (t iR) in units]
  void half_rows(int64_t rows, int64_t lefts) {
    alignas(64) float tile[kMaxRows * kPanel];
    const int64_t pairs = lefts * d_.jC, granules = plan_.b / kGranule,
                  units = z_stride_ / gemm_.unit;
    for (int64_t t = 0; t < rows; ++t) {
      T* out = du_.get() + t * r_units_ * kPanel * gemm_.unit;
      for_each_tile(pairs, gemm_.best_rows, [&](int64_t first, int64_t count) {
        for (int64_t p = 0; p < columns_.panels; ++p) {
          multiply_rows_any_length(gemm_,
                                   count,
                                   units,
                                   z_.get() + (t * pairs + first) * z_stride_,
                                   z_stride_,
                                   right_panels_.get() + p * z_stride_ * kPanel,
                                   tile,
                                   false);
          columns_.store(
              gemm_, tile, count, p * kPanel, out, du_place_.data() + first * granules, granules);
        }
      });
    }
  }

  // dleft of the chunk, and its part of dcentral.
  void project(int64_t j, int64_t lefts, const BlockPlaces<T>& places) {
    const int64_t rows = d_.iC * left_rows_;
    for (int64_t c = 0; c < lefts; ++c)
      for (int64_t p = 0; p < plan_.central_panels; ++p)
        gemm_.finish(half_sums_.get() + (c * plan_.central_panels + p) * rows * kPanel,
                     rows,
                     dhalf_.get() + c * left_rows_ * dhalf_stride_,
                     dhalf_row_.data(),
                     0,
                     consecutive(p * kPanel, d_.jC * plan_.b),
                     Finish{});
    if (wanted_.left) {
      alignas(64) float tile[kMaxRows * kPanel];
      int64_t place[kMaxRows];
      const int64_t units = inner_ / gemm_.unit;
      for (int64_t c = 0; c < lefts; ++c)
        for_each_tile(d_.iL, gemm_.best_rows, [&](int64_t first, int64_t count) {
          for (int64_t r = 0; r < count; ++r)
            place[r] = (first + r) * places.left_i + (j + c) * places.left_j;
          for (int64_t a = 0; a < d_.a; a += kPanel) {
            multiply_rows_any_length(gemm_,
                                     count,
                                     units,
                                     dhalf_.get() + (c * left_rows_ + first) * dhalf_stride_,
                                     dhalf_stride_,
                                     central_transposed_ + a * units * gemm_.unit,
                                     tile,
                                     false);
            gemm_.finish(tile, count, places.left, place, 0, consecutive(a, d_.a), Finish{});
          }
        });
    }
    if (wanted_.central) {
      const int64_t k = lefts * left_rows_;
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

  void store_right(const BlockPlaces<T>& places) {
    for (int64_t b = 0; b < d_.b; ++b)
      for (int64_t r = 0; r < d_.iR; ++r) {
        T* out = places.right + b * places.right_b + r * places.right_i;
        for (int64_t c = 0; c < d_.jR; ++c)
          store(out[c * places.right_j],
                right_sums_
                    .get()[(c / kPanel * right_rows_ + r * plan_.b + b) * kPanel + c % kPanel]);
      }
  }

  Wanted wanted_;
  const T* central_transposed_;
  float* central_sums_;  // [panels of (iC jC b), a, 32]
  int64_t z_stride_, r_units_, x_stride_, inner_, dhalf_stride_, left_turned_stride_, right_rows_;
  UnitColumns columns_;  // (iR, b) of right, exchanged
  Buffer<T> z_, u_panels_, z_panels_, du_, turned_, right_panels_, x_rows_, dhalf_, left_turned_,
      dhalf_panels_;
  Buffer<float> right_sums_, half_sums_;
  std::vector<int64_t> dhalf_row_;
  std::vector<int32_t> du_place_;
};

}  // namespace mpoe
