#include "cuda/linear_parts.h"
#include "cuda/pointwise.h"

namespace mpoe::cuda {
namespace {

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

std::size_t workspace_bytes(const LinearBackward& arguments) {
  Workspace workspace;
  Backward(arguments, workspace, nullptr).run();
  return workspace.peak();
}
void linear_backward(const LinearBackward& arguments, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  Backward(arguments, workspace, stream).run();
}

}  // namespace mpoe::cuda
