#include "cuda/embedding/embedding.h"

#include "cuda/embedding/embedding.cuh"
#include "cuda/linear/pointwise.h"
#include "cuda/routing/routing.h"
#include "cuda/linear/steps.h"
#include "cuda/workspace.h"

namespace mpoe::cuda {
namespace {

// Tokens sorted by one digit.
struct Sorted {
  int* offsets = nullptr;
  int64_t* token_of_slot = nullptr;
  int64_t* slot_of_token = nullptr;
  int bins = 0;
};

class Embedding {
 public:
  Embedding(const EmbeddingInputs& p, Workspace& workspace, cudaStream_t stream)
      : p_(p), dims_(p.dims), workspace_(workspace), stream_(stream) {
    for (auto* digit : {&left_, &centre_, &right_}) *digit = indices();
    if (launching()) {
      LAUNCH(digits_kernel, blocks_of(p.tokens), dim3(kIndexThreads), 0, stream, p.ids, p.tokens, dims_.in_features,
             dims_.size[kIC], dims_.size[kIR], left_, centre_, right_);
      check_launch("digits");
    }
    by_centre_ = sort(centre_, dims_.size[kIC]);
    by_right_ = sort(right_, dims_.size[kIR]);
    left_of_slot_ = compose(left_, by_centre_.token_of_slot);
    half_of_slot_ = compose(by_centre_.slot_of_token, by_right_.token_of_slot);
    left_rows_ = named(p.left, {kJL, kA}, dims_, dims_.elements({kJL, kA}));
    central_ = slices("C", p.central, kIC);
    right_slices_ = slices("R", p.right, kIR);
    half_ = rows({kJL, kJC, kB});
    rows_times_block(grouped(by_centre_), left_rows_, central_, half_, left_of_slot_, true);
  }

  void forward(void* y) {
    const Named sorted = output_rows(take(int64_t(p_.tokens) * dims_.out_features));
    rows_times_block(grouped(by_right_), half_, right_slices_, sorted, half_of_slot_, true);
    if (launching()) {
      combine(p_.dtype, sorted.data, by_right_.slot_of_token, nullptr, y, p_.tokens, 1, dims_.out_features, stream_);
    }
  }

  void backward(const EmbeddingBackward& out) {
    const Named drows = output_rows(take(int64_t(p_.tokens) * dims_.out_features));
    gather(out.grad, by_right_, by_right_.token_of_slot, drows.data, dims_.out_features);
    block_gradient(grouped(by_right_), half_, drows, slices("R", out.dright, kIR), half_of_slot_);
    const Named dhalf_by_right = rows({kJL, kJC, kB}), dhalf = rows({kJL, kJC, kB});
    rows_times_block(grouped(by_right_), drows, right_slices_, dhalf_by_right, nullptr, true);
    const int64_t* turned = compose(by_right_.slot_of_token, by_centre_.token_of_slot);
    gather(dhalf_by_right.data, by_centre_, turned, dhalf.data, static_cast<int>(dims_.elements({kJL, kJC, kB})));
    block_gradient(grouped(by_centre_), left_rows_, dhalf, slices("C", out.dcentral, kIC), left_of_slot_);
    const Named dleft_rows = rows({kJL, kA});
    rows_times_block(grouped(by_centre_), dhalf, central_, dleft_rows, nullptr, true);
    sum_by_left(dleft_rows, out.dleft);
  }

 private:
  bool launching() const { return !workspace_.measuring() && p_.tokens > 0; }
  static dim3 blocks_of(int count) { return dim3(static_cast<unsigned>((count + kIndexThreads - 1) / kIndexThreads)); }
  void* take(int64_t elements) const { return workspace_.take(static_cast<std::size_t>(elements * size_of(p_.dtype))); }
  int64_t* indices() const { return static_cast<int64_t*>(workspace_.take(sizeof(int64_t) * std::size_t(p_.tokens))); }

  Sorted sort(const int64_t* digit, int bins) const {
    if (bins > kMostExperts) {
      throw std::invalid_argument("a digit of " + std::to_string(bins) + " values; the kernels take " +
                                  std::to_string(kMostExperts));
    }
    Sorted sorted;
    sorted.bins = bins;
    sorted.offsets = static_cast<int*>(workspace_.take(sizeof(int) * (std::size_t(bins) + 1)));
    sorted.token_of_slot = indices();
    sorted.slot_of_token = indices();
    const Route r{digit, nullptr, p_.tokens, 1, bins, -1, sorted.offsets, sorted.token_of_slot, sorted.slot_of_token};
    const Workspace::Scope scope(workspace_);
    void* memory = workspace_.take(route_workspace_bytes(r));
    if (!workspace_.measuring()) route(r, memory, stream_);
    return sorted;
  }
  const int64_t* compose(const int64_t* outer, const int64_t* inner) const {
    int64_t* out = indices();
    if (launching()) {
      LAUNCH(compose_kernel, blocks_of(p_.tokens), dim3(kIndexThreads), 0, stream_, outer, inner, out, p_.tokens);
      check_launch("compose");
    }
    return out;
  }
  void gather(const void* from, const Sorted& by, const int64_t* index, void* to, int columns) const {
    if (launching()) dispatch(p_.dtype, from, columns, index, by.offsets + by.bins, to, p_.tokens, columns, stream_);
  }
  // dleft[iL] = sum of the rows whose left digit is iL, in the order of slots.
  void sum_by_left(const Named& rows_by_centre, void* dleft) const {
    const Sorted by_left = sort(left_, dims_.size[kIL]);
    const int64_t* order = compose(by_centre_.slot_of_token, by_left.token_of_slot);
    auto* starts = static_cast<int64_t*>(workspace_.take(sizeof(int64_t) * (std::size_t(by_left.bins) + 1)));
    if (workspace_.measuring()) return;
    LAUNCH(widen_kernel, blocks_of(by_left.bins + 1), dim3(kIndexThreads), 0, stream_,
           static_cast<const int*>(by_left.offsets), starts, by_left.bins + 1);
    check_launch("widen");
    sum_rows(p_.dtype, rows_by_centre.data, order, starts, dleft, by_left.bins,
             static_cast<int>(dims_.elements({kJL, kA})), stream_);
  }

  Named rows(const Axes& axes) const {
    const int64_t size = dims_.elements(axes);
    return named(take(size * p_.tokens), axes, dims_, size);
  }
  Named output_rows(void* data) const { return rows_of(data, {kJL, kJC, kJR}, dims_, dims_.out_features); }
  // A block whose slices along one axis act as the experts.
  Named slices(const char* name, const void* data, Axis axis) const {
    Named block = named(data, layout_of(name), dims_, 0);
    block.outer = block.stride[axis];
    block.stride[axis] = 0;
    return block;
  }
  Context grouped(const Sorted& by) const {
    Context context;
    context.dtype = p_.dtype;
    context.dims = dims_;
    context.tf32 = p_.tf32;
    context.offsets = by.offsets;
    context.experts = by.bins;
    context.slots = p_.tokens;
    context.stream = stream_;
    context.measuring = workspace_.measuring();
    return context;
  }

  const EmbeddingInputs& p_;
  const Dims& dims_;
  Workspace& workspace_;
  cudaStream_t stream_;
  int64_t *left_ = nullptr, *centre_ = nullptr, *right_ = nullptr;  // digits by token
  Sorted by_centre_, by_right_;
  const int64_t* left_of_slot_ = nullptr;  // row of left, by slot in the order of the centre
  const int64_t* half_of_slot_ = nullptr;  // row of half, by slot in the order of right
  Named left_rows_, central_, right_slices_;
  Named half_;  // [slot, jL, jC, b] in the order of the centre
};

}  // namespace

std::size_t workspace_bytes(const EmbeddingForward& arguments) {
  Workspace workspace;
  Embedding(arguments, workspace, nullptr).forward(arguments.y);
  return workspace.peak();
}
std::size_t workspace_bytes(const EmbeddingBackward& arguments) {
  Workspace workspace;
  Embedding(arguments, workspace, nullptr).backward(arguments);
  return workspace.peak();
}
void embedding_forward(const EmbeddingForward& arguments, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  Embedding(arguments, workspace, stream).forward(arguments.y);
}
void embedding_backward(const EmbeddingBackward& arguments, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  Embedding(arguments, workspace, stream).backward(arguments);
}

}  // namespace mpoe::cuda
