// Launches of one type, compiled in a file of its own by MPOE_LINEAR_LAUNCHES.
#pragma once
#include "cuda/dispatch.h"
#include "cuda/linear/gradient.cuh"
#include "cuda/linear/rebuilt.cuh"

namespace mpoe::cuda {

template <class T, int kColumns>
void launch_rebuilt(const RebuiltArguments& p, cudaStream_t stream) {
  using Tiles = RebuiltTiles<T, kColumns>;
  const int64_t slots = p.product.slots;
  const int64_t partly = slots < p.product.experts + 1 ? slots : p.product.experts + 1;
  const int64_t rows = slots / Tiles::Out::kM + partly;  // at most so many tiles
  LAUNCH((rebuilt_kernel<T, kColumns>),
         grid_of(rows * p.n.left_tiles() * p.n.right_tiles()),
         dim3(Tiles::Out::kThreads),
         Tiles::kElements * sizeof(T),
         stream,
         p);
  check_launch("rebuilt");
}
template <class T>
void launch(const RebuiltArguments& p, int columns, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (columns == kWideTile)
      return launch_rebuilt<T, kWideTile>(p, stream);
  }
  launch_rebuilt<T, kNarrowTile>(p, stream);
}
template <class T>
void launch(const GradientArguments& p, dim3 grid, cudaStream_t stream) {
  using Tiles = GradientTiles<T>;
  LAUNCH(gradient_kernel<T>,
         grid,
         dim3(Tiles::Out::kThreads),
         Tiles::kElements * sizeof(T),
         stream,
         p);
  check_launch("gradient");
}
}  // namespace mpoe::cuda

#define MPOE_LINEAR_LAUNCHES(T)                                          \
  namespace mpoe::cuda {                                                 \
  template void launch<T>(const RebuiltArguments&, int, cudaStream_t);   \
  template void launch<T>(const GradientArguments&, dim3, cudaStream_t); \
  }
