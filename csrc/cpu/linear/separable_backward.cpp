// Backward of separable shapes. Per slot, in the notation of separable.h: dh = dz right^T, dt = dh
// central^T, dx = dt left^T; over slots, dright = h^T dz, dcentral = t^T dh, dleft = x^T dt.
#include "cpu/gemm/outer.h"
#include "cpu/linear/gradient.h"
#include "cpu/linear/separable.h"

namespace mpoe {
namespace {

template <class T>
class Backward {
 public:
  Backward(const GemmKernels& gemm, const LinearBackward& in)
      : gemm_(gemm),
        in_(in),
        d_(in.dims),
        sizes_(gemm, d_),
        filled_(in.filled()),
        are_few_(are_few(gemm, in, kFewSlotsBackward)),
        right_k_(padded_k(gemm, d_.jR)),
        b_k_(padded_k(gemm, d_.b)),
        dh_k_(d_.jC * b_k_),
        dh_row_(in.product == nullptr ? row_stride(gemm, dh_k_) : dh_k_),
        wanted_(in),
        x_gradients_(in),
        activation_gradient_(gemm, in),
        dz_(activation_gradient_.get()) {}

  void run() {
    zero_gradients();
    if (filled_ > 0) {
      bias_gradient(gemm_, in_, dz_);
      pad_dz();
      slot_step();
      if (wanted_.right) {
        const T* h = static_cast<const T*>(in_.h);
        block_gradient(d_.b, d_.jR, d_.jC, h, d_.b, dz_, right_k_, static_cast<T*>(in_.dright));
      }
      if (wanted_.left)
        block_gradient(d_.iL,
                       d_.a,
                       d_.iC,
                       xs_.get(),
                       sizes_.left_k,
                       dt_.get(),
                       sizes_.a_k,
                       static_cast<T*>(in_.dleft));
      if (wanted_.central && !are_few_ && in_.product == nullptr)
        central_gradient();
    }
    x_gradients_.finish(gemm_);
  }

 private:
  // Zeroes the gradients that no slot contributes to.
  void zero_gradients() {
    if (filled_ == 0) {
      zero_rows(in_.dbias, 0, 1, d_.out_features * sizeof(T));
      zero_rows(in_.dcentral, 0, 1, d_.central_size() * sizeof(T));
    }
    for (int64_t e = 0; e < in_.experts; ++e)
      if (in_.count(e) == 0)
        zero_blocks<T>(in_, e);
  }

  // Makes dz_ rows [filled * jC, right_k]; copies only if columns are missing or not in whole
  // units.
  void pad_dz() {
    if (d_.padded_out() == d_.out_features && right_k_ == d_.jR)
      return;
    padded_dz_ = Buffer<T>(filled_ * d_.jC * right_k_);
    for (int64_t s = 0; s < filled_; ++s)
      for (int64_t j = 0; j < d_.jC; ++j)
        copy_padded(dz_ + s * d_.out_features,
                    d_.out_features,
                    j * d_.jR,
                    d_.jR,
                    padded_dz_.get() + (s * d_.jC + j) * right_k_,
                    right_k_);
    dz_ = padded_dz_.get();
  }

  // Everything with one row per slot: t and the transposed x again, dh, dt, dx. Keeps what later
  // sums need.
  void slot_step() {
    if (!wanted_.half() && !wanted_.x)
      return;
    if (in_.product != nullptr)
      return slot_step_around_product();
    if (are_few_)
      return few_slots_step();
    if (wanted_.central) {
      dh_ = Buffer<T>(filled_ * dh_row_);
      t_ = Buffer<T>(filled_ * sizes_.t_row);
    }
    if (wanted_.left) {
      xs_ = Buffer<T>(filled_ * sizes_.x_row);
      dt_ = Buffer<T>(filled_ * sizes_.t_k);
    }
    if (wanted_.left || wanted_.x) {
      central_panels_ = Buffer<T>(d_.iC * round_up(d_.a, kPanel) * dh_k_);
      pack_central();
    }
    const std::vector<Span> blocks = slot_blocks(filled_, dh_row_ * sizeof(T));
    parallel_for(std::ssize(blocks), 1, [&](int64_t begin, int64_t end) {
      const int64_t most = blocks[0].size() + 1;
      Buffer<T> dh(most * dh_row_), dt(most * sizes_.t_k);  // where nothing later needs them
      for (int64_t k = begin; k < end; ++k) {
        const Span block = blocks[k];
        if (wanted_.central)
          left_step<T>(gemm_,
                       in_,
                       sizes_,
                       block,
                       wanted_.left ? xs_.get() + block.first * sizes_.x_row : nullptr,
                       t_.get() + block.first * sizes_.t_row);
        else if (wanted_.left)
          transpose_rows<T>(gemm_, in_, sizes_, block, xs_.get() + block.first * sizes_.x_row);
        T* dh_rows = wanted_.central ? dh_.get() + block.first * dh_row_ : dh.get();
        right_step(block, dh_rows);
        if (!wanted_.left && !wanted_.x)
          continue;
        T* dt_rows = wanted_.left ? dt_.get() + block.first * sizes_.t_k : dt.get();
        central_step(block, dh_rows, dt_rows);
        if (wanted_.x)
          left_gradient_step(block, dt_rows);
      }
    });
  }

  // With the caller's product.
  void slot_step_around_product() {
    const CentralProduct& product = *in_.product;
    const int64_t block_bytes = std::max(d_.padded_in(), d_.padded_out()) * int64_t{sizeof(T)};
    steps_before_central(
        static_cast<T*>(product.t), d_.a * d_.iC, static_cast<T*>(product.dh), block_bytes);
    product.multiply();
    steps_after_central(static_cast<const T*>(product.dt), block_bytes);
  }

  // t, rows in the order of central's and `t_row` apart, and dh; see for_slot_blocks.
  void steps_before_central(T* t, int64_t t_row, T* dh, int64_t block_bytes) {
    if (wanted_.left)
      xs_ = Buffer<T>(filled_ * sizes_.x_row);
    for_slot_blocks(filled_, block_bytes, [&](Span block) {
      T* xs = wanted_.left ? xs_.get() + block.first * sizes_.x_row : nullptr;
      if (wanted_.central)
        left_step_in_order<T>(gemm_, in_, sizes_, block, xs, t + block.first * t_row, t_row);
      else if (wanted_.left)
        transpose_rows<T>(gemm_, in_, sizes_, block, xs);
      right_step(block, dh + block.first * dh_row_);
    });
  }

  // dx and the rows of dt that dleft needs, from `turned` [filled, (a iC)], the gradient of t.
  void steps_after_central(const T* turned, int64_t block_bytes) {
    if (!wanted_.left && !wanted_.x)
      return;
    const int64_t m = d_.a * d_.iC;
    dt_ = sizes_.a_k == d_.a ? Buffer<T>(filled_ * sizes_.t_k) : zeros<T>(filled_ * sizes_.t_k);
    for_slot_blocks(filled_, block_bytes, [&](Span block) {
      for (int64_t s = block.first; s < block.last; ++s)
        gemm_.transpose(turned + s * m, d_.iC, d_.a, d_.iC, dt_.get() + s * sizes_.t_k, sizes_.a_k);
      if (wanted_.x)
        left_gradient_step(block, dt_.get() + block.first * sizes_.t_k);
    });
  }

  // The same for few slots, with the gradient of central.
  void few_slots_step() {
    const int64_t m = d_.a * d_.iC, t_row = padded_k(gemm_, m);
    dh_ = Buffer<T>(filled_ * dh_row_);
    Buffer<T> t(filled_ * t_row), turned(filled_ * m);
    steps_before_central(t.get(), t_row, dh_.get(), 0);
    if (wanted_.central)
      outer_of_few(gemm_,
                   filled_,
                   t.get(),
                   t_row,
                   m,
                   dh_.get(),
                   dh_row_,
                   dh_k_,
                   static_cast<T*>(in_.dcentral));
    if (!wanted_.left && !wanted_.x)
      return;
    central_step_of_few(turned.get());
    steps_after_central(turned.get(), 0);
  }

  // dt [filled, (a iC)]
  void central_step_of_few(T* dt) const {
    constexpr int64_t kRows = 64;  // of central at a time
    const int64_t m = d_.a * d_.iC, n = dh_k_;
    parallel_for(ceil_divide(m, kRows), 1, [&](int64_t begin, int64_t end) {
      Buffer<float> sums(filled_ * kRows);
      for (int64_t i = begin * kRows; i < std::min(m, end * kRows); i += kRows) {
        const int64_t rows = std::min(kRows, m - i);
        const T* central = static_cast<const T*>(in_.central) + i * n;
        gemm_.multiply_dots(filled_, rows, n, dh_.get(), dh_row_, central, n, sums.get(), kRows);
        for (int64_t s = 0; s < filled_; ++s)
          gemm_.round_row(sums.get() + s * kRows, dt + s * m + i, rows);
      }
    });
  }

  // Panels of central^T: rows of B are (jC, b), columns (iC, a) with a in whole panels.
  void pack_central() {
    const T* central = static_cast<const T*>(in_.central);
    const int64_t row = d_.jC * d_.b, a = round_up(d_.a, kPanel);
    // Of the rows of B: one per jC if they are padded
    const int64_t parts = b_k_ == d_.b ? 1 : d_.jC;
    parallel_for_each(d_.iC, 1, [&](int64_t i) {
      for (int64_t p = 0; p < parts; ++p)
        gemm_.pack_transposed(central_panels_.get() + i * a * dh_k_ + p * b_k_ * kPanel,
                              dh_k_ / gemm_.unit,
                              central + i * row + p * d_.b,
                              d_.iC * row,
                              row / parts,
                              d_.a);
    });
  }

  // dh [block, dh_row]
  void right_step(Span block, T* dh) const {
    Buffer<T> panels(round_up(d_.b, kPanel) * right_k_);
    for_each_expert(in_, block, [&](int64_t expert, Span slots) {
      gemm_.pack_transposed(
          panels.get(), right_k_ / gemm_.unit, right_of<T>(in_, expert), d_.jR, d_.jR, d_.b);
      T* out = dh + (slots.first - block.first) * dh_row_;
      multiply_all(gemm_,
                   slots.size() * d_.jC,
                   right_k_,
                   dz_ + slots.first * d_.jC * right_k_,
                   right_k_,
                   panels.get(),
                   b_k_,
                   [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
                     store_short_rows(gemm_, tile, first, rows, c, {d_.jC, dh_row_, b_k_}, out);
                   });
    });
  }

  // dt [block, t_k]
  void central_step(Span block, const T* dh, T* dt) const {
    const int64_t a = round_up(d_.a, kPanel);
    multiply_all(gemm_,
                 block.size(),
                 dh_k_,
                 dh,
                 dh_row_,
                 central_panels_.get(),
                 d_.iC * a,
                 [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
                   const int64_t i = c / a, column = c % a;
                   if (column >= sizes_.a_k)
                     return;
                   gemm_.store(tile,
                               rows,
                               std::min(kPanel, sizes_.a_k - column),
                               dt + first * sizes_.t_k + i * sizes_.a_k + column,
                               sizes_.t_k);
                 });
  }

  // dx of the block's slots
  void left_gradient_step(Span block, const T* dt) {
    Buffer<T> panels(round_up(d_.iL, kPanel) * sizes_.a_k), turned(block.size() * d_.iC * d_.iL);
    const bool whole = d_.padded_in() == d_.in_features;
    std::vector<T> padded(whole ? 0 : d_.padded_in());
    for_each_expert(in_, block, [&](int64_t expert, Span slots) {
      gemm_.pack_transposed(
          panels.get(), sizes_.a_k / gemm_.unit, left_of<T>(in_, expert), d_.a, d_.a, d_.iL);
      const int64_t count = slots.size();
      multiply_all(
          gemm_,
          count * d_.iC,
          sizes_.a_k,
          dt + (slots.first - block.first) * sizes_.t_k,
          sizes_.a_k,
          panels.get(),
          d_.iL,
          [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
            gemm_.store(
                tile, rows, std::min(kPanel, d_.iL - c), turned.get() + first * d_.iL + c, d_.iL);
          });
      for (int64_t s = 0; s < count; ++s) {
        T* row = x_gradients_.row(slots.first + s);
        T* out = whole ? row : padded.data();
        gemm_.transpose(turned.get() + s * d_.iC * d_.iL, d_.iL, d_.iC, d_.iL, out, d_.iC);
        if (!whole)
          std::memcpy(row, out, d_.in_features * sizeof(T));
      }
    });
  }

  // out[e] [m, n] = sum over expert e's slots and their `per_slot` rows of a [., m] and b [., n].
  void block_gradient(int64_t m,
                      int64_t n,
                      int64_t per_slot,
                      const T* a,
                      int64_t a_stride,
                      const T* b,
                      int64_t b_stride,
                      T* out) const {
    // A task computes some rows of the result of one expert: several tasks per expert if experts
    // are few.
    const int64_t parts =
        std::clamp<int64_t>(4 * num_threads() / in_.experts, 1, ceil_divide(m, kPanel));
    const int64_t part_m = num_threads() == 1 ? m : round_up(ceil_divide(m, parts), kPanel);
    const int64_t cuts = ceil_divide(m, part_m);
    parallel_for_each(in_.experts * cuts, 1, [&](int64_t task) {
      const int64_t e = task / cuts, first_m = task % cuts * part_m;
      const int64_t first = in_.offsets[e] * per_slot, rows = in_.offsets[e + 1] * per_slot - first;
      if (rows == 0)
        return;
      const int64_t own_m = std::min(part_m, m - first_m);
      OuterSum<T> product(gemm_, own_m, n);
      Buffer<float> sum(own_m * product.stride());
      product(rows,
              a + first * a_stride + first_m,
              a_stride,
              b + first * b_stride,
              b_stride,
              sum.get(),
              false);
      for (int64_t i = 0; i < own_m; ++i)
        gemm_.round_row(sum.get() + i * product.stride(), out + (e * m + first_m + i) * n, n);
    });
  }

  void central_gradient() {
    constexpr int64_t kRows = 1024;  // slots whose rows are packed at a time
    const int64_t m = sizes_.t_k, n = dh_k_, stride = round_up(n, kPanel), unit = gemm_.unit;
    const int64_t most = round_up(std::min(kRows, filled_), unit),
                  a_stride = row_stride(gemm_, most);
    Buffer<T> a(m * a_stride), b(stride * most);
    Buffer<float> sum(m * stride);
    constexpr int64_t kColumns = 4 * kPanel;  // that one task turns or packs together
    const auto in_parts = [](int64_t columns, const auto& part) {
      parallel_for(ceil_divide(columns, kColumns), 1, [&](int64_t begin, int64_t end) {
        part(begin * kColumns, std::min(columns, end * kColumns) - begin * kColumns);
      });
    };
    for (int64_t first = 0; first < filled_; first += kRows) {
      const int64_t count = std::min(kRows, filled_ - first), k = padded_k(gemm_, count);
      in_parts(m, [&](int64_t start, int64_t columns) {
        turn_rows(gemm_,
                  t_.get() + first * sizes_.t_row + start,
                  sizes_.t_row,
                  count,
                  columns,
                  a.get() + start * a_stride,
                  a_stride);
      });
      in_parts(n, [&](int64_t start, int64_t columns) {
        gemm_.pack(b.get() + start * k,
                   k / unit,
                   dh_.get() + first * dh_row_ + start,
                   dh_row_,
                   count,
                   columns);
      });
      parallel_for(stride / kPanel, 1, [&](int64_t begin, int64_t end) {
        multiply_outer(
            gemm_, k, m, a.get(), a_stride, {begin, end}, b.get(), sum.get(), stride, first > 0);
      });
    }
    T* out = static_cast<T*>(in_.dcentral);
    parallel_for_each(d_.a, 1, [&](int64_t r) {
      for (int64_t i = 0; i < d_.iC; ++i) {
        const float* from = sum.get() + (i * sizes_.a_k + r) * stride;
        T* to = out + (r * d_.iC + i) * d_.jC * d_.b;
        if (b_k_ == d_.b) {
          gemm_.round_row(from, to, d_.jC * d_.b);
          continue;
        }
        for (int64_t j = 0; j < d_.jC; ++j)
          gemm_.round_row(from + j * b_k_, to + j * d_.b, d_.b);
      }
    });
  }

  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const BlockDims& d_;
  const SeparableSizes sizes_;
  const int64_t filled_;
  const bool are_few_;
  const int64_t right_k_;        // jR in whole units
  const int64_t b_k_;            // b in whole units
  const int64_t dh_k_, dh_row_;  // [jC, b], and its row stride
  const Wanted wanted_;
  RowGradients<T> x_gradients_;
  const PreActivationGradient<T> activation_gradient_;
  const T* dz_;  // that, or padded_dz_
  Buffer<T> padded_dz_;
  Buffer<T> dh_;              // [filled, dh_row]
  Buffer<T> t_;               // [filled, t_row]
  Buffer<T> xs_;              // [filled, x_row]: transposed rows of x
  Buffer<T> dt_;              // [filled, t_k]
  Buffer<T> central_panels_;  // of central^T
};

}  // namespace

void separable_backward(const LinearBackward& in) {
  with_element_type(in.dtype,
                    [&]<class T>(const GemmKernels& gemm, T) { Backward<T>(gemm, in).run(); });
}

}  // namespace mpoe
