#include "cuda/linear/panel.h"

#include "cuda/linear/launch.cuh"

namespace mpoe::cuda {
namespace {

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Axes of one block: those summed over with the rows, and those that the result keeps.
struct Sides {
  Axis summed[3], kept[3];  // of left, centre, right
};
Sides sides_of(bool transposed) {
  if (transposed) return {{kJL, kJC, kJR}, {kIL, kIC, kIR}};
  return {{kIL, kIC, kIR}, {kJL, kJC, kJR}};
}

// Everything about a product that follows from shapes.
struct Layout {
  Dims inside;  // sizes inside one panel
  Sides sides;
  PanelTiles tiles;
  bool wide = false;
  int panels[3] = {1, 1, 1};
  int64_t p = 0, q = 0, inner_first = 0, inner_second = 0, depth = 0, width = 0;
  int64_t panel_rows = 0, panel_stride = 0, half_rows = 0, half_stride = 0;
  std::size_t shared_bytes = 0;
};

template <class T>
void fill_memory(Layout& layout) {
  layout.tiles = tiles_of_panel<T>(layout.wide);
  layout.panel_rows = round_up(layout.depth, layout.tiles.step);
  layout.panel_stride = padded_stride<T>(static_cast<int>(layout.width), false);
  layout.half_rows = round_up(layout.p, layout.tiles.half_granule);
  layout.half_stride = padded_stride<T>(static_cast<int>(round_up(layout.inner_second, layout.tiles.step)), true);
  layout.shared_bytes = static_cast<std::size_t>(layout.panel_rows * layout.panel_stride +
                                                 layout.half_rows * layout.half_stride + layout.tiles.stage_elements) *
                        sizeof(T);
}

Layout layout_of_panel(const PanelProduct& product) {
  Layout layout;
  layout.inside = product.dims;
  layout.sides = sides_of(product.transposed);
  const int kept[3] = {product.shape.left, product.shape.centre, product.shape.right};
  layout.depth = layout.width = 1;
  for (int block = 0; block < 3; ++block) {
    const int size = product.dims.size[layout.sides.kept[block]];
    if (kept[block] < 1 || size % kept[block] != 0) {
      throw std::invalid_argument("a panel of " + std::to_string(kept[block]) + " indices does not divide an axis of " +
                                  std::to_string(size));
    }
    layout.panels[block] = size / kept[block];
    layout.inside.size[layout.sides.kept[block]] = kept[block];
    layout.depth *= product.dims.size[layout.sides.summed[block]];
    layout.width *= kept[block];
  }
  const bool left_first = product.shape.left_first;
  const Dims& inside = layout.inside;
  const int64_t left = inside.elements({kIL, kJL}), right = inside.elements({kIR, kJR});
  layout.p = left_first ? left : right;
  layout.q = left_first ? right : left;
  layout.inner_first = inside.size[left_first ? kA : kB];
  layout.inner_second = inside.size[left_first ? kB : kA];
  layout.wide = size_of(product.dtype) == 2 && layout.width > 64;
  switch (product.dtype) {
    case Dtype::kFloat32: product.tf32 ? fill_memory<dev::tf32>(layout) : fill_memory<float>(layout); break;
    case Dtype::kBFloat16: fill_memory<dev::bf16>(layout); break;
    case Dtype::kFloat16: fill_memory<dev::fp16>(layout); break;
    default: throw std::invalid_argument("CUDA kernels take float32, bfloat16 and float16");
  }
  if (layout.width > layout.tiles.columns) {
    throw std::invalid_argument("a panel of " + std::to_string(layout.width) + " columns; the kernel takes " +
                                std::to_string(layout.tiles.columns));
  }
  return layout;
}

// Strides of the axes in the panel [summed, kept].
Named panel_tensor(const Layout& layout, const Dims& dims) {
  Named panel;
  int64_t row = layout.panel_stride, column = 1;
  for (int block = 2; block >= 0; --block) {
    panel.stride[layout.sides.summed[block]] = row;
    panel.stride[layout.sides.kept[block]] = column;
    row *= dims.size[layout.sides.summed[block]];
    column *= layout.inside.size[layout.sides.kept[block]];
  }
  return panel;
}

PanelArguments arguments_of(const PanelProduct& product, const Layout& layout) {
  const Dims& dims = product.dims;
  const Dims& inside = layout.inside;
  const Sides& sides = layout.sides;
  const Named panel = panel_tensor(layout, dims);
  const auto block = [&](const char* name, const void* data, bool shared) {
    const Axes axes = layout_of(name);
    return named(data, axes, dims, shared ? 0 : dims.elements(axes));
  };
  const Named left = block("L", product.left, false), right = block("R", product.right, false);
  const Named central = block("C", product.central, true);
  const bool left_first = product.shape.left_first;
  const Named& first = left_first ? left : right;
  const Named& second = left_first ? right : left;
  const Axes first_outer = left_first ? Axes{kIL, kJL} : Axes{kIR, kJR};
  const Axes second_outer = left_first ? Axes{kIR, kJR} : Axes{kIL, kJL};
  const Axis inner_first = left_first ? kA : kB, inner_second = left_first ? kB : kA;

  PanelArguments p;
  const MapPair p_maps = map_pair(sorted(first_outer, first), inside, first, panel, false);
  const MapPair q_maps = map_pair(sorted(second_outer, second), inside, second, panel, false);
  const IndexMap first_k = map_pair({inner_first}, inside, first, first, false).first;
  const IndexMap central_k = map_pair({inner_first}, inside, central, central, false).first;
  const IndexMap central_n = map_pair({inner_second}, inside, central, central, false).first;
  const IndexMap second_k = map_pair({inner_second}, inside, second, second, false).first;
  p.first = operand_along(first, p_maps.first, first_k, false, product.dtype, left_first);
  p.central = operand_along(central, central_n, central_k, false, product.dtype, !left_first);
  p.second = operand_along(second, q_maps.first, second_k, false, product.dtype, !left_first);
  p.p_at = p_maps.second;
  p.q_at = q_maps.second;

  const Axes summed(sides.summed, sides.summed + 3), kept(sides.kept, sides.kept + 3);
  const int64_t in = product.transposed ? dims.out_features : dims.in_features;
  const int64_t out = product.transposed ? dims.in_features : dims.out_features;
  const Named rows = rows_of(product.rows, summed, dims, in), result = rows_of(product.out, kept, dims, out);
  const IndexMap slots = map_pair({}, dims, rows, rows, true).first;
  p.rows = operand_along(rows, slots, map_pair(summed, dims, rows, rows, false).first, true, product.dtype, true,
                         product.row_index);
  p.out = output_of(result, slots, map_pair(kept, inside, result, panel, false).first, true, false, product.dtype,
                    product.epilogue);

  const int chunk = 16 / static_cast<int>(size_of(product.dtype));
  for (int b = 0; b < 3; ++b) {
    const Axis axis = sides.kept[b];
    const int64_t step = inside.size[axis];  // indices from one panel to the next
    PanelAxis& to = p.axis[b];
    to.count = layout.panels[b];
    to.first = static_cast<int>(first.stride[axis] * step);
    to.central = static_cast<int>(central.stride[axis] * step);
    to.second = static_cast<int>(second.stride[axis] * step);
    to.out = static_cast<int>(result.stride[axis] * step);
    if (to.count == 1) continue;
    p.first.vector = p.first.vector && to.first % chunk == 0;
    p.central.vector = p.central.vector && to.central % chunk == 0;
    p.second.vector = p.second.vector && to.second % chunk == 0;
    p.out.pair = p.out.pair && to.out % 2 == 0;
  }
  const auto centre = [&](Axis axis) {
    const CentreAxis found{inside.size[axis], static_cast<int>(central.stride[axis]), static_cast<int>(panel.stride[axis])};
    p.central.vector = p.central.vector && (found.count == 1 || found.central % chunk == 0);
    return found;
  };
  p.summed = centre(sides.summed[1]);
  p.kept = centre(sides.kept[1]);
  return p;
}

}  // namespace

std::size_t panel_bytes(const PanelProduct& product) { return layout_of_panel(product).shared_bytes; }

void panel_product(const PanelProduct& product, cudaStream_t stream) {
  const Layout layout = layout_of_panel(product);
  const dev::Limits limits = dev::limits();
  if (layout.shared_bytes > limits.shared_bytes) {
    throw std::invalid_argument("a panel needs " + std::to_string(layout.shared_bytes) +
                                " bytes of shared memory; the device has " + std::to_string(limits.shared_bytes));
  }
  if (product.slots == 0) return;
  PanelArguments p = arguments_of(product, layout);
  p.p = static_cast<int>(layout.p);
  p.q = static_cast<int>(layout.q);
  p.inner_first = static_cast<int>(layout.inner_first);
  p.inner_second = static_cast<int>(layout.inner_second);
  p.depth = static_cast<int>(layout.depth);
  p.width = static_cast<int>(layout.width);
  p.half_rows = static_cast<int>(layout.half_rows);
  p.half_stride = static_cast<int>(layout.half_stride);
  p.panel_rows = static_cast<int>(layout.panel_rows);
  p.panel_stride = static_cast<int>(layout.panel_stride);
  p.offsets = product.offsets;
  p.experts = product.experts;
  p.slots = product.slots;
  // A block that multiplies fewer rows than its panel costs, in rows, spends most of its time rebuilding.
  p.least_rows = static_cast<int>(round_up(layout.inner_first + layout.inner_second, layout.tiles.rows));
  const unsigned panels = static_cast<unsigned>(layout.panels[0] * layout.panels[1] * layout.panels[2]);
  // Even if all rows go to one expert, they are spread over the device.
  const int64_t most = (product.slots + p.least_rows - 1) / p.least_rows;
  const int64_t spread = (limits.multiprocessors + panels - 1) / panels;
  const unsigned shares = static_cast<unsigned>(std::clamp<int64_t>(spread, 1, most));
  PanelLaunch launch;
  launch.left_first = product.shape.left_first;
  launch.wide = layout.wide;
  launch.grid = dim3(panels, static_cast<unsigned>(product.experts + 1), shares);
  launch.shared_bytes = layout.shared_bytes;
  switch (product.dtype) {
    case Dtype::kBFloat16: return launch_panel_bfloat16(p, launch, stream);
    case Dtype::kFloat16: return launch_panel_float16(p, launch, stream);
    default: product.tf32 ? launch_panel_tf32(p, launch, stream) : launch_panel_float(p, launch, stream);
  }
}

}  // namespace mpoe::cuda
