#include "cpu/embedding/embedding.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/gemm/multiply.h"

namespace mpoe {
namespace {

using std::int64_t;

// The key of an id, and where its row goes.
struct Place {
  int64_t key, token;
  bool operator<(const Place& other) const { return key != other.key ? key < other.key : token < other.token; }
};

constexpr int64_t kColumns = 64;            // of central times right per task: few enough for the caches
constexpr int64_t kHalfElements = 1 << 16;  // of left times central per task

// Distinct rows by (iC, shared, own). Left first, `shared` is iL and `own` is iR; right first, the other way round.
// Each pair (iC, shared) is multiplied once.
struct Plan {
  const Embedding& in;
  const bool left_first;
  const int64_t shareds, owns;  // values of the digits
  std::vector<Place> places;    // by key
  std::vector<int64_t> starts;  // first place of each distinct row, and the end
  std::vector<Span> tasks;      // rows of one iC
  int64_t most_lefts = 0;       // slices of left that are multiplied at once

  int64_t pair(int64_t row) const { return places[starts[row]].key / owns; }
  int64_t central(int64_t row) const { return pair(row) / shareds; }
  int64_t shared(int64_t row) const { return pair(row) % shareds; }
  int64_t own(int64_t row) const { return places[starts[row]].key % owns; }

  // The first row of the next pair, at most `last`.
  int64_t end_of_pair(int64_t row, int64_t last) const {
    const int64_t value = pair(row);
    while (row < last && pair(row) == value) ++row;
    return row;
  }

  explicit Plan(const Embedding& inputs)
      : in(inputs), left_first(left_first_is_cheaper(in)), shareds(left_first ? in.iL : in.iR),
        owns(left_first ? in.iR : in.iL) {
    places.reserve(in.tokens);
    for (int64_t t = 0; t < in.tokens; ++t) {
      const int64_t id = in.ids[t], right = id % in.iR, central = id / in.iR % in.iC, left = id / in.iR / in.iC;
      places.push_back({(central * shareds + (left_first ? left : right)) * owns + (left_first ? right : left), t});
    }
    std::sort(places.begin(), places.end());
    for (int64_t p = 0; p < in.tokens; ++p)
      if (p == 0 || places[p].key != places[p - 1].key) starts.push_back(p);
    const int64_t rows = static_cast<int64_t>(starts.size()), most = most_pairs();
    starts.push_back(in.tokens);
    for (int64_t row = 0; row < rows;) {
      const int64_t first = row, digit = central(row);
      int64_t pairs = 0;
      for (; pairs < most && row < rows && central(row) == digit; ++pairs) {
        const int64_t next = end_of_pair(row, rows);
        if (!left_first) most_lefts = std::max(most_lefts, next - row);
        row = next;
      }
      if (left_first) most_lefts = std::max(most_lefts, pairs);
      tasks.push_back({first, row});
    }
  }

  // Pairs per task.
  int64_t most_pairs() const {
    return std::max<int64_t>(1, left_first ? kHalfElements / (in.jL * in.jC * in.b) : kColumns / in.jR);
  }

 private:
  // By multiplications, including those wasted on the padding of panels.
  static bool left_first_is_cheaper(const Embedding& in) {
    std::vector<char> of_left(in.iL * in.iC), of_right(in.iC * in.iR);
    for (int64_t t = 0; t < in.tokens; ++t) of_left[in.ids[t] / in.iR] = of_right[in.ids[t] % (in.iC * in.iR)] = 1;
    const int64_t lefts = std::count(of_left.begin(), of_left.end(), 1);
    const int64_t rights = std::count(of_right.begin(), of_right.end(), 1);
    const int64_t rows = std::min({in.tokens, lefts * in.iR, rights * in.iL}), half = kPanel / 2;
    const int64_t left_first =
        lefts * in.jL * round_up(in.jC * in.b, half) * in.a + rows * in.jL * in.jC * round_up(in.jR, half) * in.b;
    const int64_t right_first = round_up(rights * in.jR, half) * in.a * in.jC * in.b +
                                rows * in.jL * round_up(in.jC * in.jR, half) * in.a;
    return left_first <= right_first;
  }
};

// Rows for multiply_rows, whose padding to whole units is zero.
template <class T>
Buffer<T> padded_rows(const GemmKernels& gemm, int64_t rows, int64_t k) {
  const int64_t count = rows * row_stride(gemm, k);
  return padded_k(gemm, k) == k ? Buffer<T>(count) : zeros<T>(count);
}

// The slices right[:, iR] that some row needs, packed. Two slices of 16 columns share a panel.
template <class T>
class RightPanels {
 public:
  RightPanels(const GemmKernels& gemm, const Plan& plan)
      : together_(plan.in.jR == kPanel / 2 ? 2 : 1), half_(kPanel / 2 * gemm.unit),
        size_(round_up(together_ * plan.in.jR, kPanel) * padded_k(gemm, plan.in.b)),
        place_(ceil_divide(plan.in.iR, together_), -1) {
    const Embedding& in = plan.in;
    for (size_t row = 0; row + 1 < plan.starts.size(); ++row) place_[plan.own(row) / together_] = 0;
    int64_t count = 0;
    for (int64_t& place : place_)
      if (place == 0) place = count++;
    panels_ = Buffer<T>(count * size_);
    const int64_t columns = together_ * in.jR, all = in.iR * in.jR;
    for (size_t first = 0; first < place_.size(); ++first) {
      if (place_[first] < 0) continue;
      size_t last = first + 1;
      if (columns % kPanel == 0)  // neighbours are packed together
        while (last < place_.size() && place_[last] >= 0) ++last;
      const int64_t column = first * columns;
      gemm.pack(
          panels_.get() + place_[first] * size_, padded_k(gemm, in.b) / gemm.unit,
          static_cast<const T*>(in.right) + column, all, in.b, std::min<int64_t>(last * columns, all) - column);
      first = last - 1;
    }
  }

  const T* slice(int64_t digit) const {
    return panels_.get() + place_[digit / together_] * size_ + digit % together_ * half_;
  }

 private:
  const int64_t together_, half_;  // slices that share a panel; elements of half a panel's unit
  const int64_t size_;             // elements of the panels of such slices
  std::vector<int64_t> place_;     // of these panels, or -1
  Buffer<T> panels_;
};

// One thread's memory, and what both orders do.
template <class T>
class Worker {
 public:
  Worker(const GemmKernels& gemm, const Plan& plan, T* out)
      : gemm_(gemm), plan_(plan), in_(plan.in), out_(out), ka_(padded_k(gemm, in_.a)), kb_(padded_k(gemm, in_.b)),
        stride_a_(row_stride(gemm, in_.a)), stride_b_(row_stride(gemm, in_.b)),
        left_(padded_rows<T>(gemm, plan.most_lefts * in_.jL, in_.a)),
        result_((plan.left_first ? 1 : plan.most_lefts) * row_size()) {}

 protected:
  int64_t row_size() const { return in_.jL * in_.jC * in_.jR; }

  void gather_left(int64_t number, int64_t digit) {
    const T* from = static_cast<const T*>(in_.left) + digit * in_.jL * in_.a;
    for (int64_t j = 0; j < in_.jL; ++j)
      std::memcpy(left_.get() + (number * in_.jL + j) * stride_a_, from + j * in_.a, in_.a * sizeof(T));
  }

  void write(int64_t row, const T* values) {
    for (int64_t p = plan_.starts[row]; p < plan_.starts[row + 1]; ++p)
      std::memcpy(out_ + plan_.places[p].token * in_.embedding_dim, values, in_.embedding_dim * sizeof(T));
  }

  const GemmKernels& gemm_;
  const Plan& plan_;
  const Embedding& in_;
  T* out_;
  int64_t ka_, kb_, stride_a_, stride_b_;  // a and b in whole units; row strides in elements
  Buffer<T> left_, result_;
  int64_t ready_ = -1;  // iC of the prepared slice of central
};

template <class T>
class LeftFirst : Worker<T> {
  using Base = Worker<T>;
  using Base::gemm_, Base::plan_, Base::in_, Base::ka_, Base::kb_, Base::stride_b_, Base::left_, Base::result_;

 public:
  LeftFirst(const GemmKernels& gemm, const Plan& plan, const RightPanels<T>& right, T* out)
      : Base(gemm, plan, out), right_(right), central_(ka_ * round_up(in_.jC * in_.b, kPanel)),
        half_(padded_rows<T>(gemm, plan.most_lefts * in_.jL * in_.jC, in_.b)) {}

  void run(const Span& task) {
    const int64_t digit = plan_.central(task.first), columns = in_.jC * in_.b;
    if (digit != this->ready_)
      gemm_.pack(
          central_.get(), ka_ / gemm_.unit, static_cast<const T*>(in_.central) + digit * columns, in_.iC * columns,
          in_.a, columns);
    this->ready_ = digit;
    int64_t pairs = 0;
    for (int64_t row = task.first; row < task.last; row = plan_.end_of_pair(row, task.last))
      this->gather_left(pairs++, plan_.shared(row));
    multiply_all(
        gemm_, pairs * in_.jL, ka_, left_.get(), this->stride_a_, central_.get(), columns,
        [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
          store_half(tile, first, rows, c, std::min(c + kPanel, columns));
        });
    const int64_t half_rows = in_.jL * in_.jC;
    const T* half = half_.get();
    for (int64_t row = task.first; row < task.last; half += half_rows * stride_b_)
      for (const int64_t last = plan_.end_of_pair(row, task.last); row < last; ++row) {
        multiply_all(
            gemm_, half_rows, kb_, half, stride_b_, right_.slice(plan_.own(row)), in_.jR,
            [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
              gemm_.store(tile, rows, std::min(kPanel, in_.jR - c), result_.get() + first * in_.jR + c, in_.jR);
            });
        this->write(row, result_.get());
      }
  }

 private:
  // A tile of left times central, (pair, jL) times the columns [column, last) of (jC, b), into [(pair, jL, jC), b].
  void store_half(const float* tile, int64_t first, int64_t rows, int64_t column, int64_t last) {
    for (const int64_t begin = column; column < last;) {
      const int64_t j = column / in_.b, end = std::min(last, (j + 1) * in_.b);
      gemm_.store(
          tile + column - begin, rows, end - column, half_.get() + (first * in_.jC + j) * stride_b_ + column % in_.b,
          in_.jC * stride_b_);
      column = end;
    }
  }

  const RightPanels<T>& right_;
  Buffer<T> central_, half_;
};

template <class T>
class RightFirst : Worker<T> {
  using Base = Worker<T>;
  using Base::gemm_, Base::plan_, Base::in_, Base::ka_, Base::kb_, Base::stride_b_, Base::left_, Base::result_;

 public:
  RightFirst(const GemmKernels& gemm, const Plan& plan, T* out)
      : Base(gemm, plan, out), columns_(plan.most_pairs() * in_.jR),
        central_(padded_rows<T>(gemm, in_.a * in_.jC, in_.b)), right_(in_.b * columns_),
        right_panels_(kb_ * round_up(columns_, kPanel)), both_(columns_ * in_.a * in_.jC),
        both_panels_(ka_ * round_up(in_.jC * in_.jR, kPanel)) {}

  void run(const Span& task) {
    const int64_t digit = plan_.central(task.first), wide = in_.jC * in_.jR;
    if (digit != this->ready_)
      for (int64_t i = 0; i < in_.a * in_.jC; ++i)
        std::memcpy(
            central_.get() + i * stride_b_,
            static_cast<const T*>(in_.central) + ((i / in_.jC * in_.iC + digit) * in_.jC + i % in_.jC) * in_.b,
            in_.b * sizeof(T));
    this->ready_ = digit;
    int64_t columns = 0;
    for (int64_t row = task.first; row < task.last; row = plan_.end_of_pair(row, task.last), columns += in_.jR) {
      const T* from = static_cast<const T*>(in_.right) + plan_.shared(row) * in_.jR;
      for (int64_t v = 0; v < in_.b; ++v)
        std::memcpy(right_.get() + v * columns_ + columns, from + v * in_.iR * in_.jR, in_.jR * sizeof(T));
    }
    gemm_.pack(right_panels_.get(), kb_ / gemm_.unit, right_.get(), columns_, in_.b, columns);
    multiply_all(
        gemm_, in_.a * in_.jC, kb_, central_.get(), stride_b_, right_panels_.get(), columns,
        [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
          store_both(tile, first, rows, c, std::min(c + kPanel, columns));
        });
    const T* both = both_.get();
    for (int64_t row = task.first; row < task.last; both += in_.a * wide) {
      const int64_t first = row, last = plan_.end_of_pair(row, task.last);
      gemm_.pack(both_panels_.get(), ka_ / gemm_.unit, both, wide, in_.a, wide);
      for (; row < last; ++row) this->gather_left(row - first, plan_.own(row));
      multiply_all(
          gemm_, (last - first) * in_.jL, ka_, left_.get(), this->stride_a_, both_panels_.get(), wide,
          [&](int64_t start, int64_t rows, int64_t c, const float* tile) {
            gemm_.store(tile, rows, std::min(kPanel, wide - c), result_.get() + start * wide + c, wide);
          });
      for (row = first; row < last; ++row) this->write(row, result_.get() + (row - first) * this->row_size());
    }
  }

 private:
  // A tile of central times right, (a, jC) times the columns [column, last) of (pair, jR), into [pair, a, jC, jR].
  void store_both(const float* tile, int64_t first, int64_t rows, int64_t column, int64_t last) {
    T rounded[kMaxRows * kPanel];
    gemm_.store(tile, rows, last - column, rounded, kPanel);
    for (const int64_t begin = column; column < last;) {
      const int64_t number = column / in_.jR, end = std::min(last, (number + 1) * in_.jR);
      T* const to = both_.get() + (number * in_.a * in_.jC + first) * in_.jR + column % in_.jR;
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(to + r * in_.jR, rounded + r * kPanel + column - begin, (end - column) * sizeof(T));
      column = end;
    }
  }

  const int64_t columns_;  // of a task, at most
  Buffer<T> central_, right_, right_panels_, both_, both_panels_;
};

}  // namespace

void embedding(const Embedding& in, void* out) {
  if (in.tokens == 0 || in.embedding_dim == 0) return;
  const Plan plan(in);
  with_element_type(in.dtype, [&](const GemmKernels& gemm, auto element) {
    using T = decltype(element);
    T* const rows = static_cast<T*>(out);
    const auto run = [&](const auto& make) {
      parallel_for(0, static_cast<int64_t>(plan.tasks.size()), 1, [&](int64_t begin, int64_t end) {
        auto worker = make();
        for (int64_t task = begin; task < end; ++task) worker.run(plan.tasks[task]);
      });
    };
    if (!plan.left_first) return run([&] { return RightFirst<T>(gemm, plan, rows); });
    const RightPanels<T> right(gemm, plan);
    run([&] { return LeftFirst<T>(gemm, plan, right, rows); });
  });
}

}  // namespace mpoe
