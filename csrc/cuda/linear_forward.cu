#include "cuda/linear_parts.h"

namespace mpoe::cuda {
namespace {

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

}  // namespace

std::size_t workspace_bytes(const LinearForward& arguments) {
  Workspace workspace;
  return run_forward(arguments, workspace, nullptr);
}
void linear_forward(const LinearForward& arguments, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  run_forward(arguments, workspace, stream);
}

}  // namespace mpoe::cuda
