// Hidden-side experts: parts of the groups for threads, and sums of the blocks' gradients.
// hidden_body.h computes a part. Everything is local to a group of `block` hidden units.
//
//   x, out, dx      [T, groups, b]
//   slots           by tile of tokens, expert, token; sorted once, for all groups
//   sums of a tile  [groups together, tokens of the tile, b in panels]  float32
//   cores           [E or 1, (right, left, right_gate), b, b]           float32, see HiddenPart
//
// Per (expert, group), rows are gathered, multiplied with the packed blocks and added to the sums of
// a tile, expert by expert. A token's last slot writes its sum to the result. Groups with their own
// blocks are processed together if few tokens make few sums, `kOwnFloats`: an expert's blocks are
// read in the order of memory. Groups that share their blocks are always processed together, each
// group of a token as a row, in tiles of tokens with at most `kTileFloats` sums.
#include <algorithm>
#include <cstring>

#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/experts/kernels.h"

namespace mpoe {
namespace {

// 1 MiB of sums, more if those of kChunk tokens are more.
constexpr int64_t kTileFloats = 1 << 18;
// The same for groups with their own blocks; more if one group's are.
constexpr int64_t kOwnFloats = 1 << 16;
// A part that has sums of all experts' cores, to clear and to add up, gets at least so many rows per
// expert, and there are at most so many parts.
constexpr int64_t kPartRows = 32, kMostParts = 8;

int64_t padded_block(const HiddenExperts& in) {
  return round_up(in.block, kPanel);
}

// The groups, split into parts.
class HiddenParts {
 public:
  HiddenParts(const HiddenExperts& in, int64_t count)
      : in_(in), count_(count), sorted_(in, tile_tokens()) {}

  int64_t count() const { return count_; }
  const SortedSlots& sorted() const { return sorted_; }
  HiddenPart part(int64_t number, float* scratch, int64_t scratch_size) const {
    return {
        .first = in_.groups() * number / count_,
        .last = in_.groups() * (number + 1) / count_,
        .together = together(),
        .scratch = scratch,
        .scratch_size = scratch_size,
    };
  }
  // Calls f(part, sums) for every part, by all threads; sums: `sum_floats` floats of a thread.
  template <class F>
  void for_each(int64_t scratch_size, int64_t sum_floats, const F& f) const {
    parallel_for(count_, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(scratch_size), sums(sum_floats);
      for (int64_t p = begin; p < end; ++p)
        f(part(p, scratch.get(), scratch_size), sums.get());
    });
  }

 private:
  int64_t together() const {
    const int64_t most = std::max<int64_t>(1, ceil_divide(in_.groups(), count_));
    if (in_.shared())
      return most;
    const int64_t sums = padded_block(in_) * std::max<int64_t>(1, in_.tokens);
    return std::clamp<int64_t>(kOwnFloats / sums, 1, most);
  }
  int64_t tile_tokens() const {
    if (!in_.shared())
      return std::max<int64_t>(1, in_.tokens);
    return std::max<int64_t>(kChunk, kTileFloats / (padded_block(in_) * together()));
  }

  const HiddenExperts& in_;
  const int64_t count_;
  const SortedSlots sorted_;
};

class HiddenBackwardParts {
 public:
  HiddenBackwardParts(const HiddenExperts& in, const void* grad, const ExpertsGradients& out)
      : in_(in),
        grad_(grad),
        out_(out),
        pairs_(in.tokens * in.top_k),
        square_(in.block * in.block),
        cores_(in.gated() ? 3 : 2),
        parts_(in, number_of_parts(in)),
        slot_gates_(zeros<float>(out.dgates == nullptr ? 0 : in.groups() * pairs_)) {
    scratch_size_ = run(parts_.part(0, nullptr, 0), nullptr);
  }

  void run() {
    if (in_.shared())
      run_shared();
    else
      parts_.for_each(
          scratch_size_, cores_ * square_, [&](HiddenPart part, float* sums) { run(part, sums); });
    if (out_.dgates != nullptr)
      add_gates();
  }

 private:
  static int64_t number_of_parts(const HiddenExperts& in) {
    const int64_t groups = in.groups();
    if (!in.shared())
      return std::min<int64_t>(groups, 2 * num_threads());
    const int64_t rows = in.tokens * in.top_k * groups;
    return std::clamp<int64_t>(rows / (kPartRows * in.experts), 1, std::min(groups, kMostParts));
  }

  int64_t run(HiddenPart part, float* sums) {
    part.cores = sums;
    part.slot_gates = out_.dgates == nullptr ? nullptr : slot_gates_.get();
    return expert_kernels(in_.dtype).backward(
        gemm_kernels(in_.dtype), in_, parts_.sorted().view(), part, grad_, out_);
  }

  // Every part has sums of all experts' cores. As many parts run at a time as there are threads;
  // then theirs are added to the first part's in the order of parts. Only those of experts with
  // slots are written and read.
  void run_shared() {
    const auto add = gemm_kernels(Dtype::kFloat32).add_row;
    const std::vector<int64_t>& used = parts_.sorted().used_experts();
    const int64_t count = parts_.count();
    const int64_t sums = in_.experts * cores_ * square_;  // floats of a part
    const int64_t together = std::clamp<int64_t>(num_threads(), 1, count);
    // Whose sums wait to be added at a time; the first part's need not.
    const int64_t others = together == count ? count - 1 : together;
    // One piece, for huge pages: the first part's sums, those of others, scratch memory.
    Buffer<float> memory((1 + others) * sums + together * scratch_size_);
    float* const total = memory.get();
    float* const scratch = total + (1 + others) * sums;
    for (int64_t first = 0; first < count; first += together) {
      const int64_t last = std::min(count, first + together);
      const int64_t first_added = std::max<int64_t>(first, 1);
      const auto sums_of = [&](int64_t p) {
        return p == 0 ? total : total + (1 + p - first_added) * sums;
      };
      parallel_for_each(last - first, 1, [&](int64_t p) {
        run(parts_.part(first + p, scratch + p * scratch_size_, scratch_size_), sums_of(first + p));
      });
      parallel_for_each(std::ssize(used), 1, [&](int64_t u) {
        const int64_t place = used[u] * cores_ * square_;
        for (int64_t p = first_added; p < last; ++p)
          add(sums_of(p) + place, total + place, cores_ * square_);
      });
    }
    void* const results[] = {out_.dright, out_.dleft, out_.dright_gate};
    for (int64_t core = 0; core < cores_; ++core)
      if (results[core] != nullptr)
        store_core(total + core * square_, static_cast<char*>(results[core]));
  }

  // One core of every expert, from its place in `sums` on.
  void store_core(const float* sums, char* result) {
    const int64_t bytes = square_ * size_of(in_.dtype);
    for (int64_t e = 0; e < in_.experts; ++e)
      if (parts_.sorted().has_slots(e))
        gemm_kernels(in_.dtype).round_row(sums + e * cores_ * square_, result + e * bytes, square_);
      else
        std::memset(result + e * bytes, 0, bytes);
  }

  void add_gates() {
    for (int64_t s = 0; s < pairs_; ++s) {
      float sum = 0;
      for (int64_t g = 0; g < in_.groups(); ++g)
        sum += slot_gates_.get()[g * pairs_ + s];
      out_.dgates[s] = sum;
    }
  }

  const HiddenExperts& in_;
  const void* const grad_;
  const ExpertsGradients& out_;
  const int64_t pairs_, square_;
  const int64_t cores_;  // of an expert
  const HiddenParts parts_;
  Buffer<float> slot_gates_;
  int64_t scratch_size_ = 0;  // of one part
};

}  // namespace

void experts_forward(const HiddenExperts& in, void* out) {
  if (in.tokens == 0 || in.features == 0)
    return;
  const HiddenParts parts(in, std::min<int64_t>(in.groups(), 2 * num_threads()));
  const auto run = [&](const HiddenPart& part) {
    return expert_kernels(in.dtype).forward(
        gemm_kernels(in.dtype), in, parts.sorted().view(), part, out);
  };
  const int64_t size = run(parts.part(0, nullptr, 0));
  parts.for_each(size, 0, [&](const HiddenPart& part, float*) { run(part); });
}

void experts_backward(const HiddenExperts& in, const void* grad, const ExpertsGradients& out) {
  HiddenBackwardParts(in, grad, out).run();
}

}  // namespace mpoe
