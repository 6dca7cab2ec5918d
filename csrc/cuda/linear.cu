#include "cuda/linear.h"

#include <map>
#include <sstream>

#include "cuda/few.h"
#include "cuda/panel.h"
#include "cuda/pointwise.h"
#include "cuda/steps.h"

namespace mpoe::cuda {
namespace {

using Names = std::vector<std::string>;
using Blocks = std::map<std::string, Named>;

struct Merge {
  std::string result, first, second;
};
struct Program {
  std::vector<Merge> merges;  // in this order, once per expert
  Names order;                // what x meets
  bool in_panels = false;     // rows meet W in shared memory
  PanelShape panel;
  bool in_one_launch = false;  // rows meet left, central and right in one kernel
  FewShape few;
};

Program parse(const std::string& text) {
  Program program;
  std::istringstream words(text);
  std::string word;
  bool building = true;
  std::string half;
  while (words >> word) {
    if (word == "panel") {
      program.in_panels = true;
      words >> program.panel.left >> program.panel.centre >> program.panel.right;
    } else if (word == "few") {
      program.in_one_launch = true;
      words >> program.few.left >> program.few.centre >> program.few.right >> program.few.rows;
    } else if (word == "|") {
      building = false;
    } else if (!building) {
      layout_of(word);
      program.order.push_back(word);
    } else if (word == "LC" || word == "CR") {
      half = word;
      program.merges.push_back({word, word.substr(0, 1), word.substr(1)});
    } else if (word == "W" && !half.empty()) {
      program.merges.push_back(half == "LC" ? Merge{"W", "LC", "R"} : Merge{"W", "L", "CR"});
    } else {
      throw std::invalid_argument("program '" + text + "' builds '" + word + "' from nothing");
    }
  }
  // Together, what x meets must hold every axis of the weight once, and x's own.
  Names blocks;
  for (const auto& name : program.order) {
    for (const char part : name == "W" ? std::string("LCR") : name) blocks.push_back(std::string(1, part));
  }
  std::sort(blocks.begin(), blocks.end());
  if (building || blocks != Names{"C", "L", "R"}) {
    throw std::invalid_argument("program '" + text + "' must apply left, central and right once each");
  }
  for (const auto& name : program.order) {
    bool known = name.size() == 1 && name != "W";
    for (const auto& merge : program.merges) known = known || merge.result == name;
    if (!known) throw std::invalid_argument("program '" + text + "' applies '" + name + "' without building it");
  }
  program.panel.left_first = half == "LC";
  if (program.in_panels && program.order != Names{"W"}) {
    throw std::invalid_argument("program '" + text + "' must apply W: panels hold whole weights");
  }
  if (program.in_one_launch && program.order != Names{"L", "C", "R"}) {
    throw std::invalid_argument("program '" + text + "' must apply left, central and right in this order");
  }
  return program;
}

// Whether the rows after the central step are [jC, b]: those that a separable shape's forward saves.
bool keeps_h(const Program& program, const Dims& dims) {
  return program.order == Names{"L", "C", "R"} && dims.size[kJL] == 1 && dims.size[kIR] == 1;
}

// The blocks of experts first .. first + count; a shared block stays as it is.
Named of_experts(const Named& block, int first, Dtype dtype) {
  Named part = block;
  part.data = static_cast<char*>(part.data) + block.outer * first * size_of(dtype);
  return part;
}

// Experts whose built weights, and as many gradients, fit two whole weights.
int experts_at_once(const Program& program, const Dims& dims, int experts) {
  int64_t largest = 0;
  for (const auto& merge : program.merges) largest = std::max(largest, dims.elements(layout_of(merge.result)));
  if (largest == 0) return experts;
  return static_cast<int>(std::clamp<int64_t>(dims.weight_elements() / largest, 1, experts));
}

Blocks given_blocks(const LinearInputs& p) {
  const auto block = [&](const char* name, const void* data, bool shared) {
    const Axes axes = layout_of(name);
    return named(data, axes, p.dims, shared ? 0 : p.dims.elements(axes));
  };
  return {{"L", block("L", p.left, false)}, {"C", block("C", p.central, true)}, {"R", block("R", p.right, false)}};
}
Named x_rows(const LinearInputs& p, const void* data) { return rows_of(data, {kIL, kIC, kIR}, p.dims, p.dims.in_features); }
Named y_rows(const LinearInputs& p, const void* data) { return rows_of(data, {kJL, kJC, kJR}, p.dims, p.dims.out_features); }

Context context_of(const LinearInputs& p, Workspace& workspace, cudaStream_t stream) {
  Context context;
  context.dtype = p.dtype;
  context.dims = p.dims;
  context.tf32 = p.tf32;
  context.offsets = p.offsets;
  context.experts = p.experts;
  context.slots = p.slots;
  context.stream = stream;
  context.workspace = &workspace;
  return context;
}

// Axes of the rows after they met a block: what they keep, then what is new.
Axes axes_after(const Named& rows, const Named& block) {
  Axes after;
  for (const Axis axis : rows.axes()) {
    if (!block.has(axis)) after.push_back(axis);
  }
  for (const Axis axis : block.axes()) {
    if (!rows.has(axis)) after.push_back(axis);
  }
  return after;
}

// reads_w: whether anything reads the whole weight, or only its memory is needed.
Blocks build(const Context& context, const Blocks& blocks, const Program& program, bool reads_w = true) {
  Blocks built;
  for (const auto& [name, block] : blocks) built[name] = of_experts(block, context.first, context.dtype);
  for (const auto& merge : program.merges) {
    const Named out = context.scratch(layout_of(merge.result), context.count);
    if (merge.result != "W" || reads_w) merge_blocks(context, built.at(merge.first), built.at(merge.second), out, false);
    built[merge.result] = out;
  }
  return built;
}

template <class F>
void for_chunks(Context& context, const Program& program, F&& work) {
  const int size = experts_at_once(program, context.dims, context.experts);
  for (context.first = 0; context.first < context.experts; context.first += size) {
    context.count = std::min(size, context.experts - context.first);
    const Workspace::Scope scope(*context.workspace);
    work(context.first + context.count == context.experts);
  }
}

PanelProduct panels_of(const LinearInputs& p, const PanelShape& shape) {
  PanelProduct product;
  product.dtype = p.dtype;
  product.dims = p.dims;
  product.tf32 = p.tf32;
  product.shape = shape;
  product.left = p.left;
  product.central = p.central;
  product.right = p.right;
  product.experts = p.experts;
  product.offsets = p.offsets;
  product.slots = p.slots;
  return product;
}

void forward_in_panels(const LinearForward& p, const PanelShape& shape, cudaStream_t stream) {
  PanelProduct product = panels_of(p, shape);
  product.rows = p.x;
  product.row_index = p.row_index;
  product.out = p.y;
  product.epilogue = {p.bias, p.activation, p.saved};
  panel_product(product, stream);
}

void forward_in_one_launch(const LinearForward& p, const FewShape& shape, cudaStream_t stream) {
  if (p.h) throw std::invalid_argument("a forward in one launch keeps no central rows for backward");
  FewProduct product;
  product.dtype = p.dtype;
  product.dims = p.dims;
  product.shape = shape;
  product.x = p.x;
  product.left = p.left;
  product.central = p.central;
  product.right = p.right;
  product.experts = p.experts;
  product.offsets = p.offsets;
  product.row_index = p.row_index;
  product.slots = p.slots;
  product.y = p.y;
  product.epilogue = {p.bias, p.activation, p.saved};
  few_product(product, stream);
}

std::size_t run_forward(const LinearForward& p, Workspace& workspace, cudaStream_t stream) {
  const Program program = parse(p.program);
  if (program.in_panels) {
    if (!workspace.measuring()) forward_in_panels(p, program.panel, stream);
    return 0;
  }
  if (program.in_one_launch) {
    if (!workspace.measuring()) forward_in_one_launch(p, program.few, stream);
    return 0;
  }
  const Blocks blocks = given_blocks(p);
  Context context = context_of(p, workspace, stream);
  for_chunks(context, program, [&](bool last) {
    const Blocks built = build(context, blocks, program);
    Named rows = x_rows(p, p.x);
    for (std::size_t step = 0; step < program.order.size(); ++step) {
      const std::string& name = program.order[step];
      const int64_t* index = step == 0 ? p.row_index : nullptr;
      const Named& block = built.at(name);
      if (step + 1 == program.order.size()) {
        rows_times_block(context, rows, block, y_rows(p, p.y), index, last, {p.bias, p.activation, p.saved});
        continue;
      }
      const Axes axes = axes_after(rows, block);
      const bool to_h = p.h && name == "C" && keeps_h(program, p.dims);
      const Named out = to_h ? named(p.h, axes, p.dims, p.dims.elements(axes)) : context.scratch(axes, p.slots);
      rows_times_block(context, rows, block, out, index, last && to_h);
      rows = out;
    }
  });
  return workspace.peak();
}

// One backward pass; `grads` holds the results that are wanted, by block.
class Backward {
 public:
  Backward(const LinearBackward& p, Workspace& workspace, cudaStream_t stream)
      : p_(p), program_(parse(p.program)), context_(context_of(p, workspace, stream)) {
    if (program_.in_one_launch) throw std::invalid_argument("a backward takes several launches");
  }

  void run() {
    const Dims& dims = p_.dims;
    Workspace& workspace = *context_.workspace;
    const bool through = p_.activation != kNone;
    const void* dz = p_.grad;
    if (through || p_.dbias) {
      void* own = nullptr;
      if (through) own = workspace.take(static_cast<std::size_t>(int64_t(p_.slots) * dims.out_features * size_of(p_.dtype)));
      const Workspace::Scope scope(workspace);
      const int64_t partial = p_.dbias ? partial_elements(p_.slots, dims.out_features) : 0;
      auto* sums = static_cast<float*>(workspace.take(static_cast<std::size_t>(partial) * sizeof(float)));
      if (!workspace.measuring()) {
        activation_backward(p_.dtype, p_.grad, p_.saved, own, p_.dbias, sums, p_.offsets + p_.experts, p_.slots,
                            dims.out_features, p_.activation, context_.stream);
      }
      if (through) dz = own;
    }
    const int64_t central = dims.elements(layout_of("C"));
    void* sum = p_.dcentral;  // float32, summed over the experts
    if (p_.dcentral && p_.dtype != Dtype::kFloat32) sum = workspace.take(static_cast<std::size_t>(central) * sizeof(float));
    const auto want = [&](const char* name, void* data, bool shared) {
      const Axes axes = layout_of(name);
      if (data) wanted_[name] = named(data, axes, dims, shared ? 0 : dims.elements(axes));
    };
    want("L", p_.dleft, false);
    want("C", sum, true);
    want("R", p_.dright, false);
    if (p_.dx && program_.in_panels && !workspace.measuring()) {
      PanelProduct product = panels_of(p_, program_.panel);
      product.transposed = true;
      product.rows = dz;
      product.out = p_.dx;
      panel_product(product, context_.stream);
    }
    if (wanted_.empty() && !step_dx()) return;
    const Blocks blocks = given_blocks(p_);
    for_chunks(context_, program_, [&](bool last) { chunk(blocks, dz, last); });
    if (p_.dcentral && sum != p_.dcentral && !workspace.measuring()) {
      convert(p_.dtype, static_cast<const float*>(sum), p_.dcentral, central, context_.stream);
    }
  }

 private:
  // The gradient with respect to x by steps, or null.
  void* step_dx() const { return program_.in_panels ? nullptr : p_.dx; }
  // Whether a block, or one it was built from, needs a gradient.
  bool needs(const std::string& name) const {
    for (const char part : name == "W" ? std::string("LCR") : name) {
      if (wanted_.count(std::string(1, part))) return true;
    }
    return false;
  }
  bool needs_before(std::size_t step) const {
    for (std::size_t k = 0; k < step; ++k) {
      if (needs(program_.order[k])) return true;
    }
    return false;
  }
  Named wanted(const std::string& name) const {
    const Named& grad = wanted_.at(name);
    return grad.outer ? of_experts(grad, context_.first, p_.dtype) : grad;
  }

  // What each block of the order met, as far as a gradient reads it.
  std::vector<Named> rows_before(const Blocks& built) const {
    const Names& order = program_.order;
    std::vector<Named> before{x_rows(p_, p_.x)};
    std::size_t reach = 0;
    for (std::size_t k = 0; k < order.size(); ++k) reach = needs(order[k]) ? k : reach;
    const bool has_h = p_.h && keeps_h(program_, p_.dims);
    for (std::size_t k = 0; k < reach; ++k) {
      const Axes axes = axes_after(before[k], built.at(order[k]));
      if (has_h && k == 1) {
        before.push_back(named(p_.h, axes, p_.dims, p_.dims.elements(axes)));
      } else if (has_h && k == 0 && !needs("C")) {
        before.push_back(named(nullptr, axes, p_.dims, p_.dims.elements(axes)));  // only h is read, not what led to it
      } else {
        before.push_back(context_.scratch(axes, p_.slots));
        rows_times_block(context_, before[k], built.at(order[k]), before.back(), k == 0 ? p_.row_index : nullptr, false);
      }
    }
    return before;
  }

  void chunk(const Blocks& blocks, const void* dz, bool last) {
    const Names& order = program_.order;
    Blocks built = build(context_, blocks, program_, step_dx() != nullptr);
    const std::vector<Named> before = rows_before(built);
    Named after = y_rows(p_, dz);
    Blocks gradients;  // of what was built
    for (std::size_t k = order.size(); k-- > 0;) {
      const std::string& name = order[k];
      const int64_t* index = k == 0 ? p_.row_index : nullptr;
      const bool onward = needs_before(k) || step_dx();
      Named next;
      if (onward) {
        const Axes axes = axes_after(after, built.at(name));
        next = k == 0 ? x_rows(p_, step_dx()) : context_.scratch(axes, p_.slots);
        rows_times_block(context_, after, built.at(name), next, nullptr, last && k == 0);
      }
      if (needs(name)) {
        if (wanted_.count(name)) {
          block_gradient(context_, before[k], after, wanted(name), index, name == "C" && context_.first > 0);
        } else {
          block_gradient(context_, before[k], after, built.at(name), index, false);  // its value is not read any more
          gradients[name] = built.at(name);
          built.erase(name);
        }
      }
      if (!onward) break;
      after = next;
    }
    project(built, gradients);
  }

  // Brings the gradients of what was built down to the blocks.
  void project(Blocks& built, Blocks& gradients) {
    for (auto merge = program_.merges.rbegin(); merge != program_.merges.rend(); ++merge) {
      const auto whole = gradients.find(merge->result);
      if (whole == gradients.end()) continue;
      // The given block first: after that, the built one's memory serves the built one's gradient.
      const bool first_built = merge->first.size() > 1;
      const std::string& plain = first_built ? merge->second : merge->first;
      const std::string& other = first_built ? merge->first : merge->second;
      for (const auto& [name, partner] : {std::pair{plain, other}, std::pair{other, plain}}) {
        if (!needs(name)) continue;
        if (wanted_.count(name)) {
          merge_blocks(context_, whole->second, built.at(partner), wanted(name), name == "C" && context_.first > 0);
        } else {
          merge_blocks(context_, whole->second, built.at(partner), built.at(name), false);
          gradients[name] = built.at(name);
          built.erase(name);
        }
      }
    }
  }

  const LinearBackward& p_;
  const Program program_;
  Context context_;
  Blocks wanted_;
};

}  // namespace

std::size_t workspace_bytes(const LinearForward& arguments) {
  Workspace workspace;
  return run_forward(arguments, workspace, nullptr);
}
std::size_t workspace_bytes(const LinearBackward& arguments) {
  Workspace workspace;
  Backward(arguments, workspace, nullptr).run();
  return workspace.peak();
}
void linear_forward(const LinearForward& arguments, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  run_forward(arguments, workspace, stream);
}
void linear_backward(const LinearBackward& arguments, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  Backward(arguments, workspace, stream).run();
}

}  // namespace mpoe::cuda
