// The strategy half_left, for few slots per expert: LC = left_e central is built per expert, and
// rows are multiplied by LC and right_e in the given order. Both orders work chunk by chunk, so
// that LC and the rows between the two products stay in cache:
//   LC first:  u[t, iR, (jL jC b)] = x[t, iR, (iC iL)] LC,
//              y[t, (jL jC), jR] = u[t, (jL jC), (iR b)] right, by jL
//   R first:   s[(iL iC b), (t jR)] = x[t, (iL iC), iR] right,
//              y^T[(jL jC), (t jR)] = LC[(jL jC), (iL iC b)] s, by iL
// b is padded to whole granules. Products write their results in the place and the layout in which
// the next one reads them.
#pragma once

#include "cpu/linear/blocks.h"

namespace mpoe {

// Of LC and of the rows between the products, each.
constexpr int64_t kChunkBytes = 256 * 1024;

// Shared by both orders.
struct HalfPlan {
  int64_t b;               // in whole granules
  int64_t central_panels;  // of columns (jC b)
  int64_t a_units;
  bool half_first;

  HalfPlan(const GemmKernels& gemm, const BlockDims& d, bool half_first)
      : b(round_up(d.b, kGranule)),
        central_panels(ceil_divide(d.jC * b, kPanel)),
        a_units(ceil_divide(d.a, gemm.unit)),
        half_first(half_first) {}

  // Places of the panels' columns (jC b) where the rows b of different jC are `stride` elements
  // apart.
  std::vector<ColumnMap> columns(const BlockDims& d, int64_t stride) const {
    std::vector<ColumnMap> maps;
    for (int64_t p = 0; p < central_panels; ++p) {
      maps.push_back(side_columns({1, d.jC, b, d.jC * b}, {0, d.jC}, p));
      for (int64_t& offset : maps.back().offset)
        offset = offset / b * stride + offset % b;
    }
    return maps;
  }
};

// panels [iC, central_panels, a in units, 32] of central, shared by all experts. `exchanged`: `d`
// has iC and jC exchanged, central [a, jC, iC, b] has not.
template <class T>
inline Buffer<T> pack_central(const GemmKernels& gemm,
                              const BlockDims& d,
                              const void* central,
                              const HalfPlan& plan,
                              bool exchanged = false) {
  const int64_t panel = plan.a_units * kPanel * gemm.unit;
  const int64_t i_step = exchanged ? d.b : d.jC * d.b, j_step = exchanged ? d.iC * d.b : d.b;
  Buffer<T> panels(d.iC * plan.central_panels * panel);
  parallel_for_each(d.iC * plan.central_panels, 8, [&](int64_t k) {
    ColumnMap columns =
        side_columns({1, d.jC, d.b, d.jC * d.b}, {0, d.jC}, k % plan.central_panels);
    for (int64_t& offset : columns.offset)
      offset = offset / d.b * j_step + offset % d.b;
    const T* source = static_cast<const T*>(central) + k / plan.central_panels * i_step;
    gemm.pack_granules(panels.get() + k * panel, source, d.iC * d.jC * d.b, d.a, columns);
  });
  return panels;
}

template <class T>
class HalfFirst {
 public:
  HalfFirst(const GemmKernels& gemm,
            const LinearForward& in,
            const HalfPlan& plan,
            const T* central)
      : gemm_(gemm),
        in_(in),
        d_(in.dims),
        plan_(plan),
        central_(central),
        left_rows_(padded_k(gemm, d_.iL)),
        left_stride_(row_stride(gemm, plan.a_units * gemm.unit)),
        x_stride_(row_stride(gemm, d_.iC * left_rows_)),
        k_units_(d_.iC * left_rows_ / gemm.unit),
        u_stride_(row_stride(gemm, d_.iR * plan.b)),
        right_units_(d_.iR * plan.b / gemm.unit) {
    const int64_t slab_bytes = plan.central_panels * kPanel * k_units_ * 4;  // of one jL
    chunk_ = std::clamp<int64_t>(kChunkBytes / slab_bytes, 1, d_.jL);
    rows_ = std::max<int64_t>(1, kChunkBytes / (chunk_ * d_.jC * u_stride_ * sizeof(T)));
    left_ = zeros<T>(d_.jL * left_rows_ * left_stride_);
    right_ = zeros<T>(ceil_divide(d_.jR, kPanel) * right_units_ * kPanel * gemm.unit);
    slab_ = Buffer<T>(chunk_ * plan.central_panels * k_units_ * kPanel * gemm.unit);
    x_ = zeros<T>(rows_ * d_.iR * x_stride_);
    u_ = Buffer<T>(rows_ * chunk_ * d_.jC * u_stride_);
    if (d_.padded_in() != d_.in_features)
      whole_.resize(d_.padded_in());
    u_columns_ = plan.columns(d_, u_stride_);
  }

  void run(int64_t expert) {
    load(expert);
    const int64_t begin = in_.offsets[expert], end = in_.offsets[expert + 1];
    for (int64_t j = 0; j < d_.jL; j += chunk_) {
      const int64_t count = std::min(chunk_, d_.jL - j);
      build(j, count);
      place_rows(count);
      for (int64_t first = begin; first < end; first += rows_) {
        const int64_t rows = std::min(rows_, end - first);
        if (j == 0 || end - begin > rows_)
          arrange(first, rows);
        meet_half(rows, count);
        meet_right(first, rows, j, count);
      }
    }
  }

 protected:
  void load(int64_t expert) {
    const T* left = left_of<T>(in_, expert);
    for (int64_t i = 0; i < d_.iL; ++i)
      for (int64_t j = 0; j < d_.jL; ++j)
        std::memcpy(left_.get() + (j * left_rows_ + i) * left_stride_,
                    left + (i * d_.jL + j) * d_.a,
                    d_.a * sizeof(T));
    const T* right = right_of<T>(in_, expert);
    for (int64_t r = 0; r < d_.iR; ++r)
      gemm_.pack(right_.get() + r * plan_.b * kPanel,
                 right_units_,
                 right + r * d_.jR,
                 d_.iR * d_.jR,
                 d_.b,
                 d_.jR);
  }

  // Rows of u for a chunk of `count`: [t, (jL jC)].
  void place_rows(int64_t count) {
    if (count == placed_)
      return;
    placed_ = count;
    u_row_.clear();
    for (int64_t t = 0; t < rows_; ++t)
      for (int64_t r = 0; r < d_.iR; ++r)
        u_row_.push_back(t * count * d_.jC * u_stride_ + r * plan_.b);
  }

  // slab [jL of the chunk, central_panels, (iC iL) in units, 32]
  void build(int64_t j, int64_t count) {
    alignas(64) float tile[kMaxRows * kPanel];
    alignas(64) T rounded[kMaxRows * kPanel];
    const int64_t panel = k_units_ * kPanel * gemm_.unit;
    for (int64_t i = 0; i < d_.iC; ++i)
      for (int64_t p = 0; p < plan_.central_panels; ++p) {
        const T* columns =
            central_ + (i * plan_.central_panels + p) * plan_.a_units * kPanel * gemm_.unit;
        for (int64_t c = 0; c < count; ++c) {
          T* out = slab_.get() + (c * plan_.central_panels + p) * panel + i * left_rows_ * kPanel;
          const int64_t most = gemm_.best_rows / gemm_.unit;
          for_each_tile(left_rows_ / gemm_.unit, most, [&](int64_t first, int64_t units) {
            const int64_t row = first * gemm_.unit, rows = units * gemm_.unit;
            multiply_rows(gemm_,
                          rows,
                          plan_.a_units,
                          left_.get() + ((j + c) * left_rows_ + row) * left_stride_,
                          left_stride_,
                          columns,
                          tile,
                          false);
            gemm_.store(tile, rows, kPanel, rounded, kPanel);
            gemm_.pack(out + row * kPanel, units, rounded, kPanel, rows, kPanel);
          });
        }
      }
  }

  // x [t, iR, (iC iL)]
  void arrange(int64_t first, int64_t rows) {
    for (int64_t t = 0; t < rows; ++t) {
      const T* row = row_of<T>(in_, first + t);
      if (!whole_.empty()) {
        std::memcpy(whole_.data(), row, d_.in_features * sizeof(T));
        row = whole_.data();
      }
      T* out = x_.get() + t * d_.iR * x_stride_;
      for (int64_t i = 0; i < d_.iC; ++i)
        gemm_.transpose(
            row + i * d_.iR, d_.iC * d_.iR, d_.iL, d_.iR, out + i * left_rows_, x_stride_);
    }
  }

  // u [t, (jL jC), (iR b)]
  void meet_half(int64_t rows, int64_t count) {
    const int64_t k = k_units_ * gemm_.unit, columns = plan_.central_panels * kPanel;
    for (int64_t c = 0; c < count; ++c)
      multiply_all(gemm_,
                   rows * d_.iR,
                   k,
                   x_.get(),
                   x_stride_,
                   slab_.get() + c * columns * k,
                   columns,
                   [&](int64_t first, int64_t tile_rows, int64_t column, const float* tile) {
                     gemm_.finish(tile,
                                  tile_rows,
                                  u_.get() + c * d_.jC * u_stride_,
                                  u_row_.data() + first,
                                  0,
                                  u_columns_[column / kPanel],
                                  Finish{});
                   });
  }

  void meet_right(int64_t first, int64_t rows, int64_t j, int64_t count) {
    // Columns (jL jC) of which all, or at least some, of jR exist.
    const int64_t begin = j * d_.jC, width = d_.out_features;
    const int64_t whole = std::clamp<int64_t>(width / d_.jR - begin, 0, count * d_.jC);
    const bool partial = whole < count * d_.jC && (begin + whole) * d_.jR < width;
    for (int64_t t = 0; t < rows; ++t) {
      const T* u = u_.get() + t * count * d_.jC * u_stride_;
      const int64_t place = (first + t) * width + begin * d_.jR;
      for_each_tile(whole, gemm_.best_rows, [&](int64_t row, int64_t tile_rows) {
        right_tile(u, place, begin, row, tile_rows, d_.jR);
      });
      if (partial)
        right_tile(u, place, begin, whole, 1, width % d_.jR);
    }
  }

  void right_tile(
      const T* u, int64_t place, int64_t begin, int64_t row, int64_t rows, int64_t valid) {
    alignas(64) float tile[kMaxRows * kPanel];
    Finish finish{.activation = in_.activation};
    if (in_.saved != nullptr)
      finish.saved = static_cast<T*>(in_.saved) + place + row * d_.jR;
    for (int64_t c = 0; c < valid; c += kPanel) {
      if (in_.bias != nullptr)
        for (int64_t r = 0; r < rows; ++r)
          load_bias<T>(in_, (begin + row + r) * d_.jR + c, kPanel, tile + r * kPanel);
      multiply_rows(gemm_,
                    rows,
                    right_units_,
                    u + row * u_stride_,
                    u_stride_,
                    right_.get() + c * right_units_ * gemm_.unit,
                    tile,
                    in_.bias != nullptr);
      gemm_.finish(tile,
                   rows,
                   static_cast<T*>(in_.y) + place + row * d_.jR,
                   nullptr,
                   d_.jR,
                   consecutive(c, valid),
                   finish);
    }
  }

  const GemmKernels& gemm_;
  const LinearForward& in_;
  const BlockDims& d_;
  const HalfPlan& plan_;
  const T* central_;
  int64_t left_rows_;  // iL in whole units
  int64_t left_stride_, x_stride_, k_units_, u_stride_, right_units_;
  int64_t chunk_;        // of jL
  int64_t rows_;         // slots at a time
  int64_t placed_ = -1;  // the chunk that u_row_ is for
  Buffer<T> left_;       // [jL, iL, a]
  Buffer<T> right_;      // panels of jR, inner (iR b)
  Buffer<T> slab_, x_, u_;
  std::vector<T> whole_;  // a row with its padding, if there is any
  std::vector<int64_t> u_row_;
  std::vector<ColumnMap> u_columns_;
};

template <class T>
class RightFirst {
 public:
  RightFirst(const GemmKernels& gemm,
             const LinearForward& in,
             const HalfPlan& plan,
             const T* central,
             int64_t most)
      : gemm_(gemm),
        in_(in),
        d_(in.dims),
        plan_(plan),
        central_(central),
        left_stride_(row_stride(gemm, plan.a_units * gemm.unit)),
        x_stride_(padded_k(gemm, d_.iR)),
        granules_(ceil_divide(d_.jR, kGranule)),
        columns_(gemm.unit, d_.b, d_.iR * d_.jR, d_.jR) {
    const int64_t per_left = d_.iC * plan.b;  // inner elements of one iL
    const int64_t bytes = std::max(d_.jL * d_.jC, 2 * granules_ * kGranule) * per_left * sizeof(T);
    chunk_ = std::clamp<int64_t>(kChunkBytes / bytes, 1, d_.iL);
    units_ = chunk_ * per_left / gemm.unit;
    rows_ = std::max<int64_t>(1, kChunkBytes / (granules_ * kGranule * units_ * 4));
    rows_ = round_up(rows_, ceil_divide(kPanel, granules_ * kGranule));
    half_stride_ = row_stride(gemm, chunk_ * per_left);
    left_ = Buffer<T>(d_.iL * d_.jL * left_stride_);
    half_ = Buffer<T>(d_.jL * d_.jC * half_stride_);
    s_ = zeros<T>(panels(rows_) * units_ * kPanel * gemm.unit);
    x_ = Buffer<T>(most * d_.iL * d_.iC * x_stride_);
    sums_ = Buffer<float>((most / rows_ + 1) * panels(rows_) * d_.jL * d_.jC * kPanel);
    right_ = Buffer<T>(columns_.panels * x_stride_ * kPanel);
    plan_places();
  }

  void run(int64_t expert) {
    const int64_t first = in_.offsets[expert], count = in_.count(expert);
    load(expert, first, count);
    const int64_t block_sums = panels(rows_) * d_.jL * d_.jC * kPanel;
    for (int64_t i = 0; i < d_.iL; i += chunk_) {
      const int64_t lefts = std::min(chunk_, d_.iL - i);
      build(i, lefts);
      for (int64_t t = 0; t < count; t += rows_) {
        const int64_t rows = std::min(rows_, count - t);
        meet_right(t, rows, i, lefts);
        meet_half(rows, lefts, sums_.get() + t / rows_ * block_sums, i > 0);
      }
    }
    for (int64_t t = 0; t < count; t += rows_)
      finish(first + t, std::min(rows_, count - t), sums_.get() + t / rows_ * block_sums);
  }

 private:
  int64_t panels(int64_t rows) const { return ceil_divide(rows * granules_ * kGranule, kPanel); }

  void plan_places() {
    const int64_t b_units = plan_.b / gemm_.unit;
    for (int64_t t = 0; t < rows_; ++t)
      for (int64_t l = 0; l < chunk_ * d_.iC; ++l)
        for (int64_t g = 0; g < granules_; ++g) {
          const int64_t column = (t * granules_ + g) * kGranule;
          s_place_.push_back(static_cast<int32_t>(column / kPanel * units_ * kPanel +
                                                  column % kPanel + l * b_units * kPanel));
        }
    for (int64_t i = 0; i < chunk_; ++i)
      for (int64_t j = 0; j < d_.jL; ++j)
        half_row_.push_back(j * d_.jC * half_stride_ + i * d_.iC * plan_.b);
    half_columns_ = plan_.columns(d_, half_stride_);
    for (int64_t row = 0; row < d_.jL * d_.jC; ++row)
      y_row_.push_back(row * d_.jR);
  }

  void load(int64_t expert, int64_t first, int64_t count) {
    const T* left = left_of<T>(in_, expert);
    for (int64_t r = 0; r < d_.iL * d_.jL; ++r) {
      T* out = left_.get() + r * left_stride_;
      std::memcpy(out, left + r * d_.a, d_.a * sizeof(T));
      std::fill(out + d_.a, out + plan_.a_units * gemm_.unit, T{});
    }
    const T* right = right_of<T>(in_, expert);
    columns_.pack(gemm_, right, d_.jR, d_.iR, right_.get());
    arrange_rows<T>(
        {d_.iL * d_.iC, 1, d_.iR, d_.in_features},
        gemm_.unit,
        {0, 1},
        count,
        [&](int64_t t) { return row_of<T>(in_, first + t); },
        x_.get(),
        d_.iL * d_.iC * x_stride_);
  }

  // half [(jL jC), (iL iC b)] for the iL of a chunk
  void build(int64_t i, int64_t lefts) {
    const int64_t k = plan_.a_units * gemm_.unit, columns = plan_.central_panels * kPanel;
    for (int64_t c = 0; c < d_.iC; ++c)
      multiply_all(gemm_,
                   lefts * d_.jL,
                   k,
                   left_.get() + i * d_.jL * left_stride_,
                   left_stride_,
                   central_ + c * columns * k,
                   columns,
                   [&](int64_t first, int64_t rows, int64_t column, const float* tile) {
                     gemm_.finish(tile,
                                  rows,
                                  half_.get() + c * plan_.b,
                                  half_row_.data() + first,
                                  0,
                                  half_columns_[column / kPanel],
                                  Finish{});
                   });
  }

  // s [(iL iC b) in units, (t jR)] as panels
  void meet_right(int64_t t, int64_t rows, int64_t i, int64_t lefts) {
    for (int64_t k = 0; k < rows; ++k) {
      const T* x = x_.get() + ((t + k) * d_.iL + i) * d_.iC * x_stride_;
      const int32_t* places = s_place_.data() + k * chunk_ * d_.iC * granules_;
      multiply_all(
          gemm_,
          lefts * d_.iC,
          x_stride_,
          x,
          x_stride_,
          right_.get(),
          columns_.panels * kPanel,
          [&](int64_t first, int64_t count, int64_t column, const float* tile) {
            columns_.store(
                gemm_, tile, count, column, s_.get(), places + first * granules_, granules_);
          });
    }
  }

  // sums [panel of (t jR), (jL jC), 32] (+)= half s
  void meet_half(int64_t rows, int64_t lefts, float* sums, bool accumulate) {
    const int64_t units = lefts * d_.iC * plan_.b / gemm_.unit, height = d_.jL * d_.jC;
    rows_times_panels(gemm_,
                      height,
                      units,
                      half_.get(),
                      half_stride_,
                      s_.get(),
                      units_,
                      panels(rows),
                      sums,
                      height,
                      accumulate);
  }

  void finish(int64_t slot, int64_t rows, float* sums) {
    const int64_t width = d_.out_features, height = d_.jL * d_.jC;
    const int64_t whole = std::min(height, width / d_.jR);  // rows (jL jC) of which all of jR exist
    if (in_.bias != nullptr)
      add_bias(panels(rows), sums);
    for (int64_t p = 0; p < panels(rows); ++p) {
      const float* source = sums + p * height * kPanel;
      store_rows(slot, rows, p, source, 0, whole, d_.jR);
      if (whole < height && width % d_.jR != 0)
        store_rows(slot, rows, p, source, whole, 1, width % d_.jR);
    }
  }

  void store_rows(int64_t slot,
                  int64_t rows,
                  int64_t panel,
                  const float* source,
                  int64_t first,
                  int64_t count,
                  int64_t valid) {
    const int64_t width = d_.out_features;
    ColumnMap columns{};
    for (int64_t g = 0; g < kGranules; ++g) {
      const int64_t q = panel * kGranules + g, t = q / granules_, r = q % granules_ * kGranule;
      if (t >= rows)
        continue;
      columns.offset[g] = t * width + r;
      columns.valid[g] = static_cast<int32_t>(std::clamp<int64_t>(valid - r, 0, kGranule));
    }
    Finish finish{.activation = in_.activation};
    if (in_.saved != nullptr)
      finish.saved = static_cast<T*>(in_.saved) + slot * width;
    gemm_.finish(source + first * kPanel,
                 count,
                 static_cast<T*>(in_.y) + slot * width,
                 y_row_.data() + first,
                 0,
                 columns,
                 finish);
  }

  void add_bias(int64_t count, float* sums) const {
    alignas(64) float bias[kPanel];
    const int64_t height = d_.jL * d_.jC;
    for (int64_t row = 0; row < height; ++row)
      for (int64_t g = 0; g < granules_; ++g) {
        load_bias<T>(in_, row * d_.jR + g * kGranule, kGranule, bias);
        for (int64_t q = g; q < count * kGranules; q += granules_) {
          float* out = sums + (q / kGranules * height + row) * kPanel + q % kGranules * kGranule;
          for (int64_t c = 0; c < kGranule; ++c)
            out[c] += bias[c];
        }
      }
  }

  const GemmKernels& gemm_;
  const LinearForward& in_;
  const BlockDims& d_;
  const HalfPlan& plan_;
  const T* central_;
  int64_t left_stride_, x_stride_, half_stride_;
  int64_t granules_;       // of jR
  UnitColumns columns_;    // (b, jR) of right
  int64_t chunk_, units_;  // of iL; inner units of a chunk
  int64_t rows_;           // slots at a time
  Buffer<T> left_;         // [iL jL, a]
  Buffer<T> right_, half_, s_;
  Buffer<T> x_;  // [slots of the expert, (iL iC), iR]
  Buffer<float> sums_;
  std::vector<ColumnMap> half_columns_;
  std::vector<int32_t> s_place_;
  std::vector<int64_t> half_row_, y_row_;
};

}  // namespace mpoe
