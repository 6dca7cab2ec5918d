// Tiles of the panel kernel by element type, and its launch.
#pragma once
#include <algorithm>

#include "cuda/linear/contract.h"
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

// The kernels of one type, each compiled in its own file.
void launch_panel_float(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);
void launch_panel_tf32(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);
void launch_panel_bfloat16(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);
void launch_panel_float16(const PanelArguments& p, const PanelLaunch& launch, cudaStream_t stream);

}  // namespace mpoe::cuda
