// Tiles of the panel and the gradient kernel by element type, and their launches.
#pragma once
#include <algorithm>

#include "common/types.h"
#include "cuda/linear/gradient.cuh"
#include "cuda/linear/panel.cuh"

namespace mpoe::cuda {

template <class T>
using NarrowTile = Tile<T, 64, 64, 32, 32>;
// Twice the warps; only 16-bit types have the registers and the shared memory for them.
template <class T>
using WideStreamTile = Tile<T, 128, 128, 32, 64>;
template <class T>
using WideRebuildTile = Tile<T, 64, 64, 16, 32>;

// What a launch must know about the tiles.
struct PanelTiles {
  int rows = 0, columns = 0;  // of a block's result
  int step = 0;               // of the inner index
  int half_granule = 0;       // rows of `half` are a multiple of it
  int stage_elements = 0;     // of all stages
};

template <class T, class StreamT, class RebuildT>
constexpr PanelTiles tiles_of_panel() {
  // The larger of the two directions in which an operand may be read.
  constexpr int first = std::max(Staged<T, RebuildT, RebuildT::kM, true>::kElements,
                                 Staged<T, RebuildT, RebuildT::kM, false>::kElements);
  constexpr int second = std::max(Staged<T, RebuildT, RebuildT::kN, true>::kElements,
                                  Staged<T, RebuildT, RebuildT::kN, false>::kElements);
  constexpr int rows = Staged<T, StreamT, StreamT::kM, true>::kElements;
  constexpr int stages = kStages * std::max(first + second, rows);
  static_assert(stages * sizeof(T) >= std::max(strip_bytes<StreamT>(), strip_bytes<RebuildT>()));
  return {StreamT::kM, StreamT::kN, StreamT::kK, RebuildT::kWarpM, stages};
}
template <class T>
constexpr PanelTiles tiles_of_panel(bool wide) {
  if constexpr (sizeof(T) == 2) {
    if (wide) return tiles_of_panel<T, WideStreamTile<T>, WideRebuildTile<T>>();
  }
  return tiles_of_panel<T, NarrowTile<T>, NarrowTile<T>>();
}

struct PanelLaunch {
  bool left_first = true, wide = false;
  dim3 grid;
  std::size_t shared_bytes = 0;
};

template <class T, class StreamT, class RebuildT>
void launch_panel_tiles(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream) {
  const auto kernel =
      launch.left_first ? panel_kernel<T, StreamT, RebuildT, true> : panel_kernel<T, StreamT, RebuildT, false>;
  LAUNCH(kernel, launch.grid, dim3(StreamT::kThreads), launch.shared_bytes, stream, p);
  check_launch("panel");
}
template <class T>
void launch_panel(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (launch.wide) return launch_panel_tiles<T, WideStreamTile<T>, WideRebuildTile<T>>(p, launch, stream);
  }
  launch_panel_tiles<T, NarrowTile<T>, NarrowTile<T>>(p, launch, stream);
}

constexpr int kTileSide = NarrowTile<float>::kM;  // of the gradient kernel's tiles

// Elements from one row of its regrouped tile to the next.
inline int tile_stride(Dtype dtype) {
  return size_of(dtype) == 2 ? padded_stride<dev::bf16>(kTileSide, true) : padded_stride<float>(kTileSide, true);
}

template <class T, bool kMajorOther>
void launch_gradient_of(const GradientArguments& p, dim3 grid, cudaStream_t stream) {
  using TileT = NarrowTile<T>;
  constexpr int moving = 2 * Staged<T, TileT, TileT::kM, false>::kElements;
  constexpr int stages = kStages * std::max(moving, Staged<T, TileT, TileT::kN, kMajorOther>::kElements);
  static_assert(stages * sizeof(T) >= strip_bytes<TileT>());
  constexpr std::size_t shared = (TileT::kM * padded_stride<T>(TileT::kN, true) + stages) * sizeof(T);
  const auto kernel = gradient_kernel<T, TileT, kMajorOther>;
  LAUNCH(kernel, grid, dim3(TileT::kThreads), shared, stream, p);
  check_launch("gradient");
}
template <class T>
void launch_gradient(const GradientArguments& p, dim3 grid, bool of_right, cudaStream_t stream) {
  of_right ? launch_gradient_of<T, false>(p, grid, stream) : launch_gradient_of<T, true>(p, grid, stream);
}

// The kernels of one type, each compiled in its own file.
void launch_panel_float(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);
void launch_panel_tf32(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);
void launch_panel_bfloat16(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);
void launch_panel_float16(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);
void launch_gradient_float(const GradientArguments& p, dim3 grid, bool of_right, cudaStream_t stream);
void launch_gradient_tf32(const GradientArguments& p, dim3 grid, bool of_right, cudaStream_t stream);
void launch_gradient_bfloat16(const GradientArguments& p, dim3 grid, bool of_right, cudaStream_t stream);
void launch_gradient_float16(const GradientArguments& p, dim3 grid, bool of_right, cudaStream_t stream);

}  // namespace mpoe::cuda
