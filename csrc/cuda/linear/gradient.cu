#include "cuda/linear/gradient.h"

#include "cuda/linear/launch.cuh"

namespace mpoe::cuda {
namespace {

constexpr Axis kLeft[2] = {kIL, kJL}, kRight[2] = {kIR, kJR}, kCentre[2] = {kIC, kJC};

// Sizes of the axes inside a tile.
Dims tile_of(const GradientProduct& product) {
  Dims inside = product.dims;
  const Axis axes[] = {kIL, kJL, kIR, kJR};
  for (int i = 0; i < 4; ++i) {
    const int kept = product.tile[i], size = product.dims.size[axes[i]];
    if (kept < 1 || size % kept != 0) {
      throw std::invalid_argument("a tile of " + std::to_string(kept) + " indices does not divide an axis of " +
                                  std::to_string(size));
    }
    inside.size[axes[i]] = kept;
  }
  return inside;
}

GradientArguments arguments_of(const GradientProduct& product, const Dims& inside) {
  const Dims& dims = product.dims;
  const auto& outer = product.of_right ? kRight : kLeft;
  const auto& inner = product.of_right ? kLeft : kRight;
  const auto block = [&](const char* name, const void* data) {
    const Axes axes = layout_of(name);
    return named(data, axes, dims, dims.elements(axes));
  };
  const Named x = rows_of(product.x, {kIL, kIC, kIR}, dims, dims.in_features);
  const Named dz = rows_of(product.dz, {kJL, kJC, kJR}, dims, dims.out_features);
  const Named other = block(product.of_right ? "LC" : "R", product.other);
  const Named out = block(product.of_right ? "R" : "LC", product.out);
  // The regrouped tile [outer, inner].
  Named tile;
  const int64_t row = tile_stride(product.dtype);
  tile.stride[outer[0]] = row * inside.size[outer[1]];
  tile.stride[outer[1]] = row;
  tile.stride[inner[0]] = inside.size[inner[1]];
  tile.stride[inner[1]] = 1;

  GradientArguments p;
  const IndexMap slots = map_pair({}, dims, x, x, true).first;
  const MapPair x_maps = map_pair(sorted({kIL, kIR}, x), inside, x, tile, false);
  const MapPair dz_maps = map_pair(sorted({kJL, kJR}, dz), inside, dz, tile, false);
  const IndexMap bond = map_pair({kB}, dims, other, other, false).first;
  const IndexMap summed = map_pair({inner[0], inner[1]}, inside, other, other, false).first;
  p.x = operand_along(x, x_maps.first, slots, true, product.dtype, false, product.row_index);
  p.dz = operand_along(dz, dz_maps.first, slots, true, product.dtype, false);
  p.other = operand_along(other, bond, summed, false, product.dtype, !product.of_right);
  p.x_at = x_maps.second;
  p.dz_at = dz_maps.second;
  p.out = output_of(out, map_pair({outer[0], outer[1]}, inside, out, out, false).first,
                    map_pair({kB}, dims, out, out, false).first, false, product.of_right, product.dtype);
  p.m = static_cast<int>(inside.elements({kIL, kIR}));
  p.n = static_cast<int>(inside.elements({kJL, kJR}));
  p.outer_size = static_cast<int>(inside.elements({outer[0], outer[1]}));
  p.inner_size = static_cast<int>(inside.elements({inner[0], inner[1]}));
  p.bond = dims.size[kB];
  p.offsets = product.offsets;

  const int chunk = 16 / static_cast<int>(size_of(product.dtype));
  const auto tiles = [&](Axis axis, bool central) {
    const int step = central ? 1 : inside.size[axis];
    TileAxis found{dims.size[axis] / step, static_cast<int>(x.stride[axis]) * step, static_cast<int>(dz.stride[axis]) * step,
                   static_cast<int>(other.stride[axis]) * step, static_cast<int>(out.stride[axis]) * step};
    if (found.count == 1) return found;
    p.x.vector = p.x.vector && found.x % chunk == 0;
    p.dz.vector = p.dz.vector && found.dz % chunk == 0;
    p.other.vector = p.other.vector && found.other % chunk == 0;
    p.out.pair = p.out.pair && found.out % 2 == 0;
    return found;
  };
  for (int side = 0; side < 2; ++side) {
    p.outer[side] = tiles(outer[side], false);
    p.inner[side] = tiles(inner[side], false);
    p.centre[side] = tiles(kCentre[side], true);
    if (!product.of_right) p.centre[side].out = 0;  // every part is one pair of central indices
  }
  p.part_stride = product.of_right ? product.experts * out.outer : dims.size[kB];
  return p;
}

}  // namespace

void gradient_product(const GradientProduct& product, cudaStream_t stream) {
  const Dims inside = tile_of(product);
  const GradientArguments p = arguments_of(product, inside);
  const int most = std::max({p.m, p.n, p.outer_size, p.inner_size});
  if (most > kTileSide) {
    throw std::invalid_argument("a tile of " + std::to_string(most) + " rows or columns; the kernel takes " +
                                std::to_string(kTileSide));
  }
  const int bond_tiles = (p.bond + kTileSide - 1) / kTileSide;
  const dim3 grid(static_cast<unsigned>(p.outer[0].count * p.outer[1].count * bond_tiles),
                  static_cast<unsigned>(product.parts), static_cast<unsigned>(product.experts));
  switch (product.dtype) {
    case Dtype::kBFloat16: return launch_gradient_bfloat16(p, grid, product.of_right, stream);
    case Dtype::kFloat16: return launch_gradient_float16(p, grid, product.of_right, stream);
    default: product.tf32 ? launch_gradient_tf32(p, grid, product.of_right, stream)
                          : launch_gradient_float(p, grid, product.of_right, stream);
  }
}

}  // namespace mpoe::cuda
