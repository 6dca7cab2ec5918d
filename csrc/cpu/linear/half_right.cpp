// half_right is half_left of the mirrored problem: with every (L, C, R) read as (R, C, L),
//   W[(iL iC iR), (jL jC jR)] = sum_ab left[iL, jL, a] central[a, iC, jC, b] right[b, iR, jR]
// has the blocks right [iR, jR, b], central [b, iC, jC, a] and left [a, iL, jL]. Rows, bias and the blocks of experts
// with slots are copied to that order, and results are copied back; in the mirrored sides, padding becomes real zeros.
#include "cpu/linear/blocks.h"

namespace mpoe {
namespace {

BlockDims mirrored(const BlockDims& d) {
  return {d.iR, d.jR, d.b, d.iC, d.jC, d.a, d.iL, d.jL, d.padded_in(), d.padded_out()};
}

// Calls f(k, c, full) for every C of `count` rows: the first `full` of its L have all of R, the others a part or none.
template <class F>
void for_each_slice(const Side& side, std::int64_t count, const F& f) {
  const std::int64_t grain = ceil_divide(16 * 1024, side.L * side.R);
  parallel_for(0, count * side.C, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t c = task % side.C, left = side.features - side.offset(0, c, side.R);
      f(task / side.C, c, left < 0 ? 0 : std::min(side.L, left / (side.C * side.R) + 1));
    }
  });
}

// Whole rows (R, C, L) from `count` rows in(k), which are (L, C, R).
template <class T, class Source>
Buffer<T> mirror_rows(const GemmKernels& gemm, const Side& side, std::int64_t count, const Source& in) {
  const std::int64_t height = side.C * side.R, width = side.C * side.L;
  Buffer<T> rows(count * side.L * height);
  for_each_slice(side, count, [&](std::int64_t k, std::int64_t c, std::int64_t full) {
    const T* from = in(k);
    T* to = rows.get() + k * side.L * height + c * side.L;
    gemm.transpose(from + c * side.R, height, full, side.R, to, width);
    for (std::int64_t l = full; l < side.L; ++l)
      for (std::int64_t r = 0; r < side.R; ++r) {
        const std::int64_t place = side.offset(l, c, r);
        to[r * width + l] = place < side.features ? from[place] : T{};
      }
  });
  return rows;
}

// The reverse, without the padding: row k to out(k).
template <class T, class Target>
void restore_rows(
    const GemmKernels& gemm, const Side& side, std::int64_t count, const Buffer<T>& rows, const Target& out) {
  const std::int64_t height = side.C * side.R, width = side.C * side.L;
  for_each_slice(side, count, [&](std::int64_t k, std::int64_t c, std::int64_t full) {
    const T* from = rows.get() + k * side.L * height + c * side.L;
    T* to = out(k);
    gemm.transpose(from, width, side.R, full, to + c * side.R, height);
    if (full < side.L)
      for (std::int64_t r = 0; r < side.R && side.offset(full, c, r) < side.features; ++r)
        to[side.offset(full, c, r)] = from[r * width + full];
  });
}

// Inputs of the mirrored problem, in separate memory.
template <class T>
class Mirror {
 public:
  Mirror(const GemmKernels& gemm, const LinearInputs& in)
      : gemm_(gemm), in_(in), d_(in.dims), left_side_{d_.iL * d_.jL, 1, d_.a, d_.iL * d_.jL * d_.a},
        central_side_{d_.a, d_.iC * d_.jC, d_.b, d_.a * d_.iC * d_.jC * d_.b},
        right_side_{d_.b, 1, d_.iR * d_.jR, d_.b * d_.iR * d_.jR},
        rows_(in.row_index == nullptr ? in.filled() : in.tokens) {
    offsets_.push_back(0);
    for (std::int64_t e = 0; e < in.experts; ++e) {
      if (in.offsets[e] == in.offsets[e + 1]) continue;
      busy_.push_back(e);
      offsets_.push_back(in.offsets[e + 1]);
    }
    x_ = rows(in_side(d_), rows_, in.x);
    central_ = rows(central_side_, 1, in.central);
    left_ = mirror_rows<T>(
        gemm, left_side_, experts(), [&](std::int64_t k) { return of_expert(in_.left, left_side_, k); });
    right_ = mirror_rows<T>(
        gemm, right_side_, experts(), [&](std::int64_t k) { return of_expert(in_.right, right_side_, k); });
  }

  // Rows of one of the sides of the weight.
  Buffer<T> rows(const Side& side, std::int64_t count, const void* in) const {
    if (in == nullptr) return {};
    return mirror_rows<T>(
        gemm_, side, count, [&](std::int64_t k) { return static_cast<const T*>(in) + k * side.features; });
  }
  void restore(const Side& side, std::int64_t count, const Buffer<T>& rows, void* out) const {
    if (out == nullptr) return;
    restore_rows<T>(
        gemm_, side, count, rows, [&](std::int64_t k) { return static_cast<T*>(out) + k * side.features; });
  }

  LinearInputs inputs() const {
    LinearInputs in = in_;
    in.dims = mirrored(d_);
    in.x = x_.get();
    in.tokens = rows_;
    in.left = right_.get();
    in.central = central_.get();
    in.right = left_.get();
    in.experts = experts();
    in.offsets = offsets_.data();
    in.slots = in_.filled();
    return in;
  }

  // Memory for a gradient; none if `wanted` is null.
  Buffer<T> left_gradient(const void* wanted) const { return gradient(wanted, left_side_, experts()); }
  Buffer<T> central_gradient(const void* wanted) const { return gradient(wanted, central_side_, 1); }
  Buffer<T> right_gradient(const void* wanted) const { return gradient(wanted, right_side_, experts()); }
  Buffer<T> row_gradient(const void* wanted) const { return gradient(wanted, whole(in_side(d_)), rows_); }
  Buffer<T> bias_gradient(const void* wanted) const { return gradient(wanted, whole(out_side(d_)), 1); }

  void store_left(const Buffer<T>& gradient, void* out) const { store_block(left_side_, gradient, out); }
  void store_central(const Buffer<T>& gradient, void* out) const { restore(central_side_, 1, gradient, out); }
  void store_right(const Buffer<T>& gradient, void* out) const { store_block(right_side_, gradient, out); }
  void store_rows(const Buffer<T>& gradient, void* out) const {
    restore(in_side(d_), rows_, gradient, out);
    zero_rows(out, rows_, in_.tokens, d_.in_features * sizeof(T));
  }

 private:
  static Side whole(Side side) { return {side.L, side.C, side.R, side.L * side.C * side.R}; }
  std::int64_t experts() const { return static_cast<std::int64_t>(busy_.size()); }

  const T* of_expert(const void* blocks, const Side& side, std::int64_t k) const {
    return static_cast<const T*>(blocks) + busy_[k] * side.features;
  }
  Buffer<T> gradient(const void* wanted, const Side& side, std::int64_t count) const {
    return wanted == nullptr ? Buffer<T>() : Buffer<T>(count * side.features);
  }
  void store_block(const Side& side, const Buffer<T>& gradient, void* out) const {
    if (out == nullptr) return;
    for (std::int64_t e = 0; e < in_.experts; ++e)
      if (in_.offsets[e] == in_.offsets[e + 1]) zero_rows(out, e, e + 1, side.features * sizeof(T));
    restore_rows<T>(gemm_, side, experts(), gradient, [&](std::int64_t k) {
      return static_cast<T*>(out) + busy_[k] * side.features;
    });
  }

  const GemmKernels& gemm_;
  const LinearInputs& in_;
  const BlockDims& d_;
  const Side left_side_, central_side_, right_side_;  // a block, described as rows of a side
  const std::int64_t rows_;                           // of x
  std::vector<std::int64_t> busy_, offsets_;          // experts with slots
  Buffer<T> x_, left_, central_, right_;              // mirrored
};

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const Side side = out_side(in.dims);
  const std::int64_t filled = in.filled(), row_bytes = side.features * sizeof(T);
  const Mirror<T> mirror(gemm, in);
  const Buffer<T> bias = mirror.rows(side, 1, in.bias);
  Buffer<T> y(filled * in.dims.padded_out()), saved(in.saved == nullptr ? 0 : filled * in.dims.padded_out());
  LinearForward turned{};
  static_cast<LinearInputs&>(turned) = mirror.inputs();
  turned.bias = bias.get();
  turned.y = y.get();
  turned.saved = in.saved == nullptr ? nullptr : saved.get();
  half_left_forward(turned);
  mirror.restore(side, filled, y, in.y);
  mirror.restore(side, filled, saved, in.saved);
  zero_rows(in.y, filled, in.slots, row_bytes);
  zero_rows(in.saved, filled, in.slots, row_bytes);
}

template <class T>
void backward(const GemmKernels& gemm, const LinearBackward& in) {
  const Side side = out_side(in.dims);
  const Mirror<T> mirror(gemm, in);
  const Buffer<T> grad = mirror.rows(side, in.filled(), in.grad);
  const Buffer<T> saved = mirror.rows(side, in.filled(), in.saved);
  Buffer<T> dx = mirror.row_gradient(in.dx), dleft = mirror.left_gradient(in.dleft),
            dcentral = mirror.central_gradient(in.dcentral), dright = mirror.right_gradient(in.dright),
            dbias = mirror.bias_gradient(in.dbias);
  LinearBackward turned{};
  static_cast<LinearInputs&>(turned) = mirror.inputs();
  turned.grad = grad.get();
  turned.saved = saved.get();
  turned.dx = dx.get();
  turned.dleft = dright.get();
  turned.dcentral = dcentral.get();
  turned.dright = dleft.get();
  turned.dbias = dbias.get();
  half_left_backward(turned);
  mirror.store_rows(dx, in.dx);
  mirror.store_left(dleft, in.dleft);
  mirror.store_central(dcentral, in.dcentral);
  mirror.store_right(dright, in.dright);
  mirror.restore(side, 1, dbias, in.dbias);
}

}  // namespace

void half_right_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&](const GemmKernels& gemm, auto element) {
    forward<decltype(element)>(gemm, in);
  });
}

void half_right_backward(const LinearBackward& in) {
  with_element_type(in.dtype, [&](const GemmKernels& gemm, auto element) {
    backward<decltype(element)>(gemm, in);
  });
}

}  // namespace mpoe
