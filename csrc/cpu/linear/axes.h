// The axes of the blocks and of the rows that they multiply, the addresses of elements, and copies
// that change the order of axes in a state of the rows.
#pragma once

#include <array>

#include "cpu/linear/common.h"

namespace mpoe {

enum Axis : int {
  kInLeft,
  kOutLeft,
  kBondLeft,
  kInCentral,
  kOutCentral,
  kBondRight,
  kInRight,
  kOutRight
};
constexpr int kAxes = 8;

using Axes = std::vector<Axis>;  // from the slowest to the fastest
// Per axis: its size, or its stride in elements
using AxisValues = std::array<int64_t, kAxes>;

inline AxisValues axis_sizes(const BlockDims& d) {
  return {d.iL, d.jL, d.a, d.iC, d.jC, d.b, d.iR, d.jR};
}

inline int64_t product(const AxisValues& sizes, const Axes& axes) {
  int64_t elements = 1;
  for (const Axis axis : axes)
    elements *= sizes[axis];
  return elements;
}

inline Axes operator+(Axes first, const Axes& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// A matrix [rows, columns] whose rows are `row_stride` elements apart; no row axes: a dense tensor.
struct AxisMatrix {
  Axes rows, columns;
  int64_t row_stride;

  AxisValues strides(const AxisValues& sizes) const {
    AxisValues found{};
    const auto fill = [&](const Axes& axes, int64_t step) {
      for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
        found[*axis] = step;
        step *= sizes[*axis];
      }
    };
    fill(columns, 1);
    fill(rows, row_stride);
    return found;
  }
};

// Copies elements from one order of the same axes to another.
class Permutation {
 public:
  Permutation() = default;
  Permutation(const AxisValues& sizes, const AxisMatrix& from, const AxisMatrix& to) {
    const AxisValues from_strides = from.strides(sizes), to_strides = to.strides(sizes);
    std::vector<Move> moves;
    for (const Axis axis : to.rows + to.columns) {
      const Move next{sizes[axis], from_strides[axis], to_strides[axis]};
      if (next.size == 1)
        continue;
      // Axes adjacent in both orders are merged.
      if (!moves.empty() && moves.back().from == next.size * next.from &&
          moves.back().to == next.size * next.to)
        moves.back() = {moves.back().size * next.size, next.from, next.to};
      else
        moves.push_back(next);
    }
    if (!moves.empty()) {
      inner_ = moves.back();
      moves.pop_back();
    }
    const auto fastest =
        std::find_if(moves.begin(), moves.end(), [](const Move& move) { return move.from == 1; });
    if (inner_.to == 1 && fastest != moves.end()) {
      across_ = *fastest;
      moves.erase(fastest);
    }
    places_.push_back({0, 0});
    for (const Move& move : moves) {
      const auto before = std::move(places_);
      places_.clear();
      for (const auto& [source, target] : before)
        for (int64_t i = 0; i < move.size; ++i)
          places_.push_back({source + i * move.from, target + i * move.to});
    }
  }

  // Copies `count` tensors, `in_step` elements apart, to others `out_step` apart. `gemm` is for the
  // elements' dtype.
  template <class T>
  void run(const GemmKernels& gemm,
           int64_t count,
           const T* in,
           int64_t in_step,
           T* out,
           int64_t out_step) const {
    for (int64_t k = 0; k < count; ++k, in += in_step, out += out_step)
      copy(gemm, 0, places(), in, out);
  }
  // One tensor, by all threads.
  template <class T>
  void run_by_all(const GemmKernels& gemm, const T* in, T* out) const {
    const int64_t grain = ceil_divide(16 * 1024, inner_.size * across_.size);
    parallel_for(
        places(), grain, [&](int64_t begin, int64_t end) { copy(gemm, begin, end, in, out); });
  }
  // Whether both orders are the same, without padding.
  bool is_identity() const {
    return places() == 1 && across_.size == 1 && inner_.from == 1 && inner_.to == 1;
  }

 private:
  int64_t places() const { return std::ssize(places_); }
  template <class T>
  void copy(const GemmKernels& gemm, int64_t begin, int64_t end, const T* in, T* out) const {
    for (int64_t p = begin; p < end; ++p) {
      const auto& [from, to] = places_[p];
      if (inner_.from == 1 && inner_.to == 1)
        std::memcpy(out + to, in + from, inner_.size * sizeof(T));
      else if (across_.size > 1)
        gemm.transpose(in + from, inner_.from, inner_.size, across_.size, out + to, across_.to);
      else
        for (int64_t i = 0; i < inner_.size; ++i)
          out[to + i * inner_.to] = in[from + i * inner_.from];
    }
  }

  struct Move {
    int64_t size, from, to;  // of an axis, and its strides in both orders
  };
  Move inner_{1, 1, 1};  // the fastest axis of the target
  Move across_{
      1, 1, 1};  // the fastest axis of the source, if it is a different one and `inner_` is dense
  std::vector<std::pair<int64_t, int64_t>> places_;  // offsets along the others in both
};

}  // namespace mpoe
