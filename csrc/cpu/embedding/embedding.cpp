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

// An id in the order of iC, iR, iL, and where its row goes.
struct Place {
  int64_t key, token;
  bool operator<(const Place& other) const { return key != other.key ? key < other.key : token < other.token; }
};

// Distinct rows [first, last), all of one iC.
struct Task {
  int64_t first, last;
  bool left_first;
};

constexpr int64_t kColumns = 64;              // of central times right per task: few enough for the caches
constexpr int64_t kHalfElements = 1 << 16;    // of left times central per task

struct Plan {
  std::vector<Place> places;    // by key
  std::vector<int64_t> starts;  // first place of each distinct row, and the end
  std::vector<Task> tasks;
  int64_t most_left_first = 0, most_right_first = 0;  // rows multiplied at once

  const Embedding& in;

  int64_t key(int64_t row) const { return places[starts[row]].key; }
  int64_t left_digit(int64_t row) const { return key(row) % in.iL; }
  int64_t right_digit(int64_t row) const { return key(row) / in.iL % in.iR; }
  int64_t central_digit(int64_t row) const { return key(row) / in.iL / in.iR; }

  // The first row after `row` with a different digit, at most `last`.
  template <class Digit>
  int64_t end_of_run(int64_t row, int64_t last, const Digit& digit) const {
    const int64_t value = digit(row);
    while (row < last && digit(row) == value) ++row;
    return row;
  }
  int64_t end_of_right(int64_t row, int64_t last) const {
    return end_of_run(row, last, [&](int64_t r) { return right_digit(r); });
  }

  explicit Plan(const Embedding& inputs) : in(inputs) {
    places.reserve(in.tokens);
    for (int64_t t = 0; t < in.tokens; ++t) {
      const int64_t id = in.ids[t], right = id % in.iR, central = id / in.iR % in.iC, left = id / in.iR / in.iC;
      places.push_back({(central * in.iR + right) * in.iL + left, t});
    }
    std::sort(places.begin(), places.end());
    for (int64_t p = 0; p < in.tokens; ++p)
      if (p == 0 || places[p].key != places[p - 1].key) starts.push_back(p);
    const int64_t rows = static_cast<int64_t>(starts.size());
    starts.push_back(in.tokens);
    for (int64_t row = 0; row < rows;) {
      const int64_t last = end_of_run(row, rows, [&](int64_t r) { return central_digit(r); });
      add_tasks(row, last);
      row = last;
    }
  }

  void add_tasks(int64_t first, int64_t last) {
    int64_t rights = 0;
    for (int64_t row = first; row < last; row = end_of_right(row, last)) ++rights;
    // Multiplications, including those wasted on the padding of panels.
    const int64_t rows = last - first;
    const int64_t left_first =
        rows * (in.jL * round_up(in.jC * in.b, kPanel) * in.a + in.jR * round_up(in.jL * in.jC, kPanel) * in.b);
    const int64_t right_first = round_up(rights * in.jR, kPanel) * in.a * in.jC * in.b +
                                rows * in.jL * round_up(in.jC * in.jR, kPanel) * in.a;
    if (left_first <= right_first) {
      const int64_t most = std::max<int64_t>(1, kHalfElements / (in.jL * in.jC * in.b));
      for_each_tile(rows, most, [&](int64_t start, int64_t count) {
        tasks.push_back({first + start, first + start + count, true});
        most_left_first = std::max(most_left_first, count);
      });
      return;
    }
    const int64_t most = rights_at_once(in);
    while (first < last) {
      int64_t end = first;
      for (int64_t n = 0; n < most && end < last; ++n) {
        const int64_t next = end_of_right(end, last);
        most_right_first = std::max(most_right_first, next - end);
        end = next;
      }
      tasks.push_back({first, end, false});
      first = end;
    }
  }

  static int64_t rights_at_once(const Embedding& in) { return std::max<int64_t>(1, kColumns / in.jR); }
};

// The slices of right that some row needs, as rows [iR, jR, b], `stride` apart; the others are left uninitialised.
template <class T>
Buffer<T> transposed_right(const GemmKernels& gemm, const Plan& plan, int64_t stride) {
  const Embedding& in = plan.in;
  std::vector<char> used(in.iR);
  for (size_t row = 0; row + 1 < plan.starts.size(); ++row) used[plan.right_digit(row)] = 1;
  Buffer<T> out(in.iR * in.jR * stride);
  for (auto first = used.begin(); (first = std::find(first, used.end(), 1)) != used.end();) {
    const auto last = std::find(first, used.end(), 0);
    const int64_t column = (first - used.begin()) * in.jR, columns = (last - first) * in.jR;
    T* rows = out.get() + column * stride;
    gemm.transpose(static_cast<const T*>(in.right) + column, in.iR * in.jR, in.b, columns, rows, stride);
    for (int64_t c = 0; c < columns; ++c) std::fill(rows + c * stride + in.b, rows + (c + 1) * stride, T{});
    first = last;
  }
  return out;
}

// One thread's memory, and the products of each kind of task.
template <class T>
class Worker {
 public:
  Worker(const GemmKernels& gemm, const Plan& plan, const T* right_rows, T* out)
      : gemm_(gemm), plan_(plan), in_(plan.in), right_rows_(right_rows), out_(out), ka_(padded_k(gemm, in_.a)),
        kb_(padded_k(gemm, in_.b)), stride_a_(row_stride(gemm, in_.a)), stride_b_(row_stride(gemm, in_.b)) {
    const int64_t most = std::max(plan.most_left_first, plan.most_right_first);
    left_ = zeros<T>(most * in_.jL * stride_a_);
    result_ = Buffer<T>(std::max<int64_t>(1, plan.most_right_first) * row_size());
    if (plan.most_left_first > 0) {
      panels_ = Buffer<T>(ka_ * round_up(in_.jC * in_.b, kPanel));
      half_ = Buffer<T>(plan.most_left_first * in_.jL * in_.jC * in_.b);
      half_panels_ = Buffer<T>(kb_ * round_up(in_.jL * in_.jC, kPanel));
      turned_ = Buffer<T>(in_.jR * round_up(in_.jL * in_.jC, kPanel));
    }
    if (plan.most_right_first > 0) {
      const int64_t columns = Plan::rights_at_once(in_) * in_.jR;
      central_ = zeros<T>(in_.a * in_.jC * stride_b_);
      chosen_ = Buffer<T>(columns * stride_b_);
      right_panels_ = Buffer<T>(kb_ * round_up(columns, kPanel));
      both_ = Buffer<T>(columns * in_.a * in_.jC);
      both_panels_ = Buffer<T>(ka_ * round_up(in_.jC * in_.jR, kPanel));
    }
  }

  void run(const Task& task) { task.left_first ? left_first(task) : right_first(task); }

 private:
  int64_t row_size() const { return in_.jL * in_.jC * in_.jR; }

  // Copies the rows of left for the distinct rows [first, last), `stride_a_` apart.
  void gather_left(int64_t first, int64_t last) {
    T* target = left_.get();
    for (int64_t row = first; row < last; ++row) {
      const T* from = static_cast<const T*>(in_.left) + plan_.left_digit(row) * in_.jL * in_.a;
      for (int64_t j = 0; j < in_.jL; ++j, target += stride_a_, from += in_.a)
        std::memcpy(target, from, in_.a * sizeof(T));
    }
  }

  void write(int64_t row, const T* values) {
    for (int64_t p = plan_.starts[row]; p < plan_.starts[row + 1]; ++p)
      std::memcpy(out_ + plan_.places[p].token * in_.embedding_dim, values, in_.embedding_dim * sizeof(T));
  }

  void left_first(const Task& task) {
    const int64_t digit = plan_.central_digit(task.first), columns = in_.jC * in_.b, pairs = in_.jL * in_.jC;
    if (digit != packed_) {
      gemm_.pack(
          panels_.get(), ka_ / gemm_.unit, static_cast<const T*>(in_.central) + digit * columns, in_.iC * columns,
          in_.a, columns);
      packed_ = digit;
    }
    gather_left(task.first, task.last);
    multiply_all(
        gemm_, (task.last - task.first) * in_.jL, ka_, left_.get(), stride_a_, panels_.get(), columns,
        [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
          gemm_.store(tile, rows, std::min(kPanel, columns - c), half_.get() + first * columns + c, columns);
        });
    // right[:, iR] has too few columns to fill panels: its transpose is multiplied with that of the half.
    const int64_t wide = round_up(pairs, kPanel);
    for (int64_t row = task.first; row < task.last; ++row) {
      const T* half = half_.get() + (row - task.first) * pairs * in_.b;
      gemm_.pack_transposed(half_panels_.get(), kb_ / gemm_.unit, half, in_.b, in_.b, pairs);
      multiply_all(
          gemm_, in_.jR, kb_, right_rows_ + plan_.right_digit(row) * in_.jR * stride_b_, stride_b_, half_panels_.get(),
          pairs, [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
            gemm_.store(tile, rows, kPanel, turned_.get() + first * wide + c, wide);
          });
      gemm_.transpose(turned_.get(), wide, in_.jR, pairs, result_.get(), in_.jR);
      write(row, result_.get());
    }
  }

  void right_first(const Task& task) {
    const int64_t digit = plan_.central_digit(task.first), wide = in_.jC * in_.jR;
    if (digit != copied_) {
      for (int64_t i = 0; i < in_.a * in_.jC; ++i)
        std::memcpy(
            central_.get() + i * stride_b_,
            static_cast<const T*>(in_.central) + ((i / in_.jC * in_.iC + digit) * in_.jC + i % in_.jC) * in_.b,
            in_.b * sizeof(T));
      copied_ = digit;
    }
    int64_t columns = 0;
    for (int64_t row = task.first; row < task.last; row = plan_.end_of_right(row, task.last), columns += in_.jR)
      std::memcpy(
          chosen_.get() + columns * stride_b_, right_rows_ + plan_.right_digit(row) * in_.jR * stride_b_,
          in_.jR * stride_b_ * sizeof(T));
    gemm_.pack_transposed(right_panels_.get(), kb_ / gemm_.unit, chosen_.get(), stride_b_, in_.b, columns);
    multiply_all(
        gemm_, in_.a * in_.jC, kb_, central_.get(), stride_b_, right_panels_.get(), columns,
        [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
          scatter_both(tile, first, rows, c, std::min(c + kPanel, columns));
        });
    int64_t number = 0;
    for (int64_t row = task.first; row < task.last; ++number) {
      const int64_t last = plan_.end_of_right(row, task.last);
      gemm_.pack(both_panels_.get(), ka_ / gemm_.unit, both_.get() + number * in_.a * wide, wide, in_.a, wide);
      gather_left(row, last);
      multiply_all(
          gemm_, (last - row) * in_.jL, ka_, left_.get(), stride_a_, both_panels_.get(), wide,
          [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
            gemm_.store(tile, rows, std::min(kPanel, wide - c), result_.get() + first * wide + c, wide);
          });
      for (const int64_t start = row; row < last; ++row) write(row, result_.get() + (row - start) * row_size());
    }
  }

  // A tile of central[:, iC] [(a, jC), b] times the task's right [b, (number of iR, jR)], into [number, a, jC, jR].
  void scatter_both(const float* tile, int64_t first, int64_t rows, int64_t column, int64_t last) {
    T rounded[kMaxRows * kPanel];
    gemm_.store(tile, rows, kPanel, rounded, kPanel);
    const int64_t wide = in_.jC * in_.jR;
    for (const int64_t begin = column; column < last;) {
      const int64_t number = column / in_.jR, end = std::min(last, (number + 1) * in_.jR);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        std::memcpy(
            both_.get() + (number * in_.a + i / in_.jC) * wide + i % in_.jC * in_.jR + column % in_.jR,
            rounded + r * kPanel + column - begin, (end - column) * sizeof(T));
      }
      column = end;
    }
  }

  const GemmKernels& gemm_;
  const Plan& plan_;
  const Embedding& in_;
  const T* right_rows_;  // from transposed_right
  T* out_;
  int64_t ka_, kb_, stride_a_, stride_b_;  // a and b in whole units; row strides in elements
  Buffer<T> left_, result_;
  int64_t packed_ = -1, copied_ = -1;  // iC of the slice of central in panels_ and in central_
  Buffer<T> panels_, half_, half_panels_, turned_;                     // left first
  Buffer<T> central_, chosen_, right_panels_, both_, both_panels_;  // right first
};

}  // namespace

void embedding(const Embedding& in, void* out) {
  if (in.tokens == 0 || in.embedding_dim == 0) return;
  const Plan plan(in);
  with_element_type(in.dtype, [&](const GemmKernels& gemm, auto element) {
    using T = decltype(element);
    const Buffer<T> right_rows = transposed_right<T>(gemm, plan, row_stride(gemm, in.b));
    parallel_for(0, static_cast<int64_t>(plan.tasks.size()), 1, [&](int64_t begin, int64_t end) {
      Worker<T> worker(gemm, plan, right_rows.get(), static_cast<T*>(out));
      for (int64_t task = begin; task < end; ++task) worker.run(plan.tasks[task]);
    });
  });
}

}  // namespace mpoe
