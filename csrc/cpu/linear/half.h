// The strategy half_left, for few slots per expert: LC = left_e central, the "half", is built per
// expert, and rows are multiplied by LC and right_e in the given order. Both orders work chunk by
// chunk, so that LC and the rows between the two products stay in cache:
//   HalfFirst:   u[t, iR, (jL jC b)] = x[t, iR, (iC iL)] LC,
//                y[t, (jL jC), jR] = u[t, (jL jC), (iR b)] right, by chunks of jL
//   RightFirst:  s[(iL iC b), (t jR)] = x[t, (iL iC), iR] right,
//                y^T[(jL jC), (t jR)] = LC[(jL jC), (iL iC b)] s, by chunks of iL
//
// Index map. t is a slot. Features in are in the order (iL iC iR), features out in (jL jC jR), the
// last index fastest; the last features may be missing. The blocks of an expert are left [iL, jL,
// a], central [a, iC, jC, b], which all experts share, and right [b, iR, jR]. b is padded to whole
// granules, an index that is contracted to whole units (gemm.h). A comment above a step gives the
// layout of what it writes, which is the one that the next product reads: "[n, k in units, 32]" are
// n packed panels of 32 columns.
#pragma once

#include "cpu/linear/blocks.h"

namespace mpoe {

// Of LC and of the rows between the products, each.
constexpr int64_t kChunkBytes = 256 * 1024;

// Shared by both orders.
struct HalfPlan {
  int64_t b;               // in whole granules
  int64_t central_panels;  // of columns (jC b)
  int64_t a;               // in whole units
  bool half_first;

  HalfPlan(const GemmKernels& gemm, const BlockDims& d, bool half_first)
      : b(round_up(d.b, kGranule)),
        central_panels(ceil_divide(d.jC * b, kPanel)),
        a(padded_k(gemm, d.a)),
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
  const int64_t panel = plan.a * kPanel;
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
        left_stride_(row_stride(gemm, plan.a)),
        x_k_(d_.iC * left_rows_),
        x_stride_(row_stride(gemm, x_k_)),
        u_stride_(row_stride(gemm, d_.iR * plan.b)),
        right_units_(d_.iR * plan.b / gemm.unit) {
    const int64_t half_size = plan.central_panels * kPanel * x_k_;  // of one jL
    jL_chunk_ = std::clamp<int64_t>(kChunkBytes / (half_size * sizeof(T)), 1, d_.jL);
    slots_ = std::max<int64_t>(1, kChunkBytes / (jL_chunk_ * d_.jC * u_stride_ * sizeof(T)));
    left_ = zeros<T>(d_.jL * left_rows_ * left_stride_);
    right_ = zeros<T>(ceil_divide(d_.jR, kPanel) * right_units_ * kPanel * gemm.unit);
    half_ = Buffer<T>(jL_chunk_ * half_size);
    x_ = zeros<T>(slots_ * d_.iR * x_stride_);
    u_ = Buffer<T>(slots_ * jL_chunk_ * d_.jC * u_stride_);
    if (d_.padded_in() != d_.in_features)
      padded_row_.resize(d_.padded_in());
    u_columns_ = plan.columns(d_, u_stride_);
  }

  void run(int64_t expert) {
    load_blocks(expert);
    const int64_t begin = in_.offsets[expert], end = in_.offsets[expert + 1];
    for (int64_t jL = 0; jL < d_.jL; jL += jL_chunk_) {
      const int64_t lefts = std::min(jL_chunk_, d_.jL - jL);
      build_half(jL, lefts);
      place_u_rows(lefts);
      for (int64_t first = begin; first < end; first += slots_) {
        const int64_t slots = std::min(slots_, end - first);
        if (jL == 0 || end - begin > slots_)
          load_rows(first, slots);
        rows_times_half(slots, lefts);
        u_times_right(first, slots, jL, lefts);
      }
    }
  }

 protected:
  void load_blocks(int64_t expert) {
    const T* left = left_of<T>(in_, expert);
    for (int64_t iL = 0; iL < d_.iL; ++iL)
      for (int64_t jL = 0; jL < d_.jL; ++jL)
        std::memcpy(left_.get() + (jL * left_rows_ + iL) * left_stride_,
                    left + (iL * d_.jL + jL) * d_.a,
                    d_.a * sizeof(T));
    const T* right = right_of<T>(in_, expert);
    for (int64_t iR = 0; iR < d_.iR; ++iR)
      gemm_.pack(right_.get() + iR * plan_.b * kPanel,
                 right_units_,
                 right + iR * d_.jR,
                 d_.iR * d_.jR,
                 d_.b,
                 d_.jR);
  }

  // Where the rows (t iR) of u [t, (jL jC), (iR b)] begin, for a chunk of `lefts`.
  void place_u_rows(int64_t lefts) {
    if (lefts == u_rows_lefts_)
      return;
    u_rows_lefts_ = lefts;
    u_row_.clear();
    for (int64_t t = 0; t < slots_; ++t)
      for (int64_t iR = 0; iR < d_.iR; ++iR)
        u_row_.push_back(t * lefts * d_.jC * u_stride_ + iR * plan_.b);
  }

  // half [(jL of the chunk, panels of (jC b)), (iC iL) in units, 32]
  void build_half(int64_t jL, int64_t lefts) {
    alignas(64) float tile[kMaxRows * kPanel];
    alignas(64) T rounded[kMaxRows * kPanel];
    const int64_t panel = x_k_ * kPanel;
    for (int64_t iC = 0; iC < d_.iC; ++iC)
      for (int64_t p = 0; p < plan_.central_panels; ++p) {
        const T* columns = central_ + (iC * plan_.central_panels + p) * plan_.a * kPanel;
        for (int64_t l = 0; l < lefts; ++l) {
          T* out = half_.get() + (l * plan_.central_panels + p) * panel + iC * left_rows_ * kPanel;
          const int64_t most = gemm_.best_rows / gemm_.unit;
          for_each_tile(left_rows_ / gemm_.unit, most, [&](int64_t first, int64_t units) {
            const int64_t row = first * gemm_.unit, rows = units * gemm_.unit;
            multiply_rows_any_length(gemm_,
                                     rows,
                                     plan_.a / gemm_.unit,
                                     left_.get() + ((jL + l) * left_rows_ + row) * left_stride_,
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
  void load_rows(int64_t first, int64_t slots) {
    for (int64_t t = 0; t < slots; ++t) {
      const T* row = row_of<T>(in_, first + t);
      if (!padded_row_.empty()) {
        std::memcpy(padded_row_.data(), row, d_.in_features * sizeof(T));
        row = padded_row_.data();
      }
      T* out = x_.get() + t * d_.iR * x_stride_;
      for (int64_t iC = 0; iC < d_.iC; ++iC)
        gemm_.transpose(
            row + iC * d_.iR, d_.iC * d_.iR, d_.iL, d_.iR, out + iC * left_rows_, x_stride_);
    }
  }

  // u [t, (jL jC), (iR b)]
  void rows_times_half(int64_t slots, int64_t lefts) {
    const int64_t columns = plan_.central_panels * kPanel;
    for (int64_t l = 0; l < lefts; ++l)
      multiply_all(gemm_,
                   slots * d_.iR,
                   x_k_,
                   x_.get(),
                   x_stride_,
                   half_.get() + l * columns * x_k_,
                   columns,
                   [&](int64_t first, int64_t tile_rows, int64_t column, const float* tile) {
                     gemm_.finish(tile,
                                  tile_rows,
                                  u_.get() + l * d_.jC * u_stride_,
                                  u_row_.data() + first,
                                  0,
                                  u_columns_[column / kPanel],
                                  Finish{});
                   });
  }

  // y [t, (jL jC), jR] of the chunk
  void u_times_right(int64_t first, int64_t slots, int64_t jL, int64_t lefts) {
    // Columns (jL jC) of which all, or at least some, of jR exist.
    const int64_t begin = jL * d_.jC, width = d_.out_features;
    const int64_t whole = std::clamp<int64_t>(width / d_.jR - begin, 0, lefts * d_.jC);
    const bool partial = whole < lefts * d_.jC && (begin + whole) * d_.jR < width;
    for (int64_t t = 0; t < slots; ++t) {
      const T* u = u_.get() + t * lefts * d_.jC * u_stride_;
      const int64_t place = (first + t) * width + begin * d_.jR;
      for_each_tile(whole, gemm_.best_rows, [&](int64_t row, int64_t tile_rows) {
        store_tile(u, place, begin, row, tile_rows, d_.jR);
      });
      if (partial)
        store_tile(u, place, begin, whole, 1, width % d_.jR);
    }
  }

  // `rows` of (jL jC) from `row` of the chunk on, of which `valid` of jR exist; the chunk begins at
  // `place` in y and at `begin` in (jL jC).
  void store_tile(
      const T* u, int64_t place, int64_t begin, int64_t row, int64_t rows, int64_t valid) {
    alignas(64) float tile[kMaxRows * kPanel];
    Finish finish{.activation = in_.activation};
    if (in_.saved != nullptr)
      finish.saved = static_cast<T*>(in_.saved) + place + row * d_.jR;
    for (int64_t c = 0; c < valid; c += kPanel) {
      if (in_.bias != nullptr)
        for (int64_t r = 0; r < rows; ++r)
          load_bias<T>(in_, (begin + row + r) * d_.jR + c, kPanel, tile + r * kPanel);
      multiply_rows_any_length(gemm_,
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
  int64_t left_stride_;
  int64_t x_k_;  // (iC iL), what x and LC contract
  int64_t x_stride_, u_stride_, right_units_;
  int64_t jL_chunk_;           // jL at a time
  int64_t slots_;              // at a time
  int64_t u_rows_lefts_ = -1;  // the chunk that u_row_ is for
  Buffer<T> left_;             // [jL, iL, a]
  Buffer<T> right_;            // panels of jR, inner (iR b)
  Buffer<T> half_, x_, u_;
  std::vector<T> padded_row_;  // a row with its padding, if there is any
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
        left_stride_(row_stride(gemm, plan.a)),
        x_stride_(padded_k(gemm, d_.iR)),
        granules_(ceil_divide(d_.jR, kGranule)),
        columns_(gemm.unit, d_.b, d_.iR * d_.jR, d_.jR) {
    const int64_t per_left = d_.iC * plan.b;  // inner elements of one iL
    const int64_t bytes = std::max(d_.jL * d_.jC, 2 * granules_ * kGranule) * per_left * sizeof(T);
    iL_chunk_ = std::clamp<int64_t>(kChunkBytes / bytes, 1, d_.iL);
    const int64_t k = iL_chunk_ * per_left;
    s_units_ = k / gemm.unit;
    slots_ = std::max<int64_t>(1, kChunkBytes / (granules_ * kGranule * k * sizeof(T)));
    slots_ = round_up(slots_, ceil_divide(kPanel, granules_ * kGranule));
    half_stride_ = row_stride(gemm, k);
    left_ = Buffer<T>(d_.iL * d_.jL * left_stride_);
    half_ = Buffer<T>(d_.jL * d_.jC * half_stride_);
    s_ = zeros<T>(panels(slots_) * kPanel * k);
    x_ = Buffer<T>(most * d_.iL * d_.iC * x_stride_);
    sums_ = Buffer<float>((most / slots_ + 1) * panels(slots_) * d_.jL * d_.jC * kPanel);
    right_ = Buffer<T>(columns_.panels * x_stride_ * kPanel);
    place_results();
  }

  void run(int64_t expert) {
    const int64_t first = in_.offsets[expert], count = in_.count(expert);
    load_expert(expert, first, count);
    const int64_t block_sums = panels(slots_) * d_.jL * d_.jC * kPanel;
    for (int64_t iL = 0; iL < d_.iL; iL += iL_chunk_) {
      const int64_t lefts = std::min(iL_chunk_, d_.iL - iL);
      build_half(iL, lefts);
      for (int64_t t = 0; t < count; t += slots_) {
        const int64_t slots = std::min(slots_, count - t);
        rows_times_right(t, slots, iL, lefts);
        half_times_s(slots, lefts, sums_.get() + t / slots_ * block_sums, iL > 0);
      }
    }
    for (int64_t t = 0; t < count; t += slots_)
      store(first + t, std::min(slots_, count - t), sums_.get() + t / slots_ * block_sums);
  }

 private:
  int64_t panels(int64_t slots) const { return ceil_divide(slots * granules_ * kGranule, kPanel); }

  // Where results go: granules of s, rows (iL jL) and columns (jC b) of half, rows (jL jC) of y.
  // Granule g of slot t is the columns [8 (t granules_ + g), + 8) of s.
  void place_results() {
    const int64_t b_units = plan_.b / gemm_.unit;
    for (int64_t t = 0; t < slots_; ++t)
      for (int64_t row = 0; row < iL_chunk_ * d_.iC; ++row)
        for (int64_t granule = 0; granule < granules_; ++granule) {
          const int64_t column = (t * granules_ + granule) * kGranule;
          s_place_.push_back(static_cast<int32_t>(column / kPanel * s_units_ * kPanel +
                                                  column % kPanel + row * b_units * kPanel));
        }
    for (int64_t iL = 0; iL < iL_chunk_; ++iL)
      for (int64_t jL = 0; jL < d_.jL; ++jL)
        half_row_.push_back(jL * d_.jC * half_stride_ + iL * d_.iC * plan_.b);
    half_columns_ = plan_.columns(d_, half_stride_);
    for (int64_t row = 0; row < d_.jL * d_.jC; ++row)
      y_row_.push_back(row * d_.jR);
  }

  // left, right, and x [t, (iL iC), iR in whole units]
  void load_expert(int64_t expert, int64_t first, int64_t count) {
    const T* left = left_of<T>(in_, expert);
    for (int64_t r = 0; r < d_.iL * d_.jL; ++r) {
      T* out = left_.get() + r * left_stride_;
      std::memcpy(out, left + r * d_.a, d_.a * sizeof(T));
      std::fill(out + d_.a, out + plan_.a, T{});
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
  void build_half(int64_t iL, int64_t lefts) {
    const int64_t k = plan_.a, columns = plan_.central_panels * kPanel;
    for (int64_t iC = 0; iC < d_.iC; ++iC)
      multiply_all(gemm_,
                   lefts * d_.jL,
                   k,
                   left_.get() + iL * d_.jL * left_stride_,
                   left_stride_,
                   central_ + iC * columns * k,
                   columns,
                   [&](int64_t first, int64_t rows, int64_t column, const float* tile) {
                     gemm_.finish(tile,
                                  rows,
                                  half_.get() + iC * plan_.b,
                                  half_row_.data() + first,
                                  0,
                                  half_columns_[column / kPanel],
                                  Finish{});
                   });
  }

  // s [(iL iC b) in units, (t jR)] as panels
  void rows_times_right(int64_t first_slot, int64_t slots, int64_t iL, int64_t lefts) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      const T* x = x_.get() + ((first_slot + slot) * d_.iL + iL) * d_.iC * x_stride_;
      const int32_t* places = s_place_.data() + slot * iL_chunk_ * d_.iC * granules_;
      multiply_all(
          gemm_,
          lefts * d_.iC,
          x_stride_,
          x,
          x_stride_,
          right_.get(),
          columns_.panels * kPanel,
          [&](int64_t row, int64_t tile_rows, int64_t column, const float* tile) {
            columns_.store(
                gemm_, tile, tile_rows, column, s_.get(), places + row * granules_, granules_);
          });
    }
  }

  // sums [panel of (t jR), (jL jC), 32] (+)= half s
  void half_times_s(int64_t slots, int64_t lefts, float* sums, bool accumulate) {
    const int64_t units = lefts * d_.iC * plan_.b / gemm_.unit, height = d_.jL * d_.jC;
    rows_times_panels(gemm_,
                      height,
                      units,
                      half_.get(),
                      half_stride_,
                      s_.get(),
                      s_units_,
                      panels(slots),
                      sums,
                      height,
                      accumulate);
  }

  // y of `slots` from `slot` on
  void store(int64_t slot, int64_t slots, float* sums) {
    const int64_t width = d_.out_features, height = d_.jL * d_.jC;
    const int64_t whole = std::min(height, width / d_.jR);  // rows (jL jC) with all of jR
    if (in_.bias != nullptr)
      add_bias(panels(slots), sums);
    for (int64_t p = 0; p < panels(slots); ++p) {
      const float* source = sums + p * height * kPanel;
      store_panel(slot, slots, p, source, 0, whole, d_.jR);
      if (whole < height && width % d_.jR != 0)
        store_panel(slot, slots, p, source, whole, 1, width % d_.jR);
    }
  }

  // Of a panel (t jR) of sums: `count` rows (jL jC) from `first` on, of which `valid` of jR exist.
  void store_panel(int64_t slot,
                   int64_t slots,
                   int64_t panel,
                   const float* source,
                   int64_t first,
                   int64_t count,
                   int64_t valid) {
    const int64_t width = d_.out_features;
    ColumnMap columns{};
    for (int64_t g = 0; g < kGranules; ++g) {
      const int64_t q = panel * kGranules + g, t = q / granules_, r = q % granules_ * kGranule;
      if (t >= slots)
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

  void add_bias(int64_t panel_count, float* sums) const {
    alignas(64) float bias[kPanel];
    const int64_t height = d_.jL * d_.jC;
    for (int64_t row = 0; row < height; ++row)
      for (int64_t g = 0; g < granules_; ++g) {
        load_bias<T>(in_, row * d_.jR + g * kGranule, kGranule, bias);
        for (int64_t q = g; q < panel_count * kGranules; q += granules_) {
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
  int64_t granules_;     // of jR
  UnitColumns columns_;  // (b, jR) of right
  int64_t iL_chunk_;     // iL at a time
  int64_t s_units_;      // of (iL iC b) in a chunk
  int64_t slots_;        // at a time
  Buffer<T> left_;       // [iL jL, a]
  Buffer<T> right_, half_, s_;
  Buffer<T> x_;  // [slots of the expert, (iL iC), iR]
  Buffer<float> sums_;
  std::vector<ColumnMap> half_columns_;
  std::vector<int32_t> s_place_;
  std::vector<int64_t> half_row_, y_row_;
};

}  // namespace mpoe
