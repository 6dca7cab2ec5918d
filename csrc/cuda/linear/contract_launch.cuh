// Picks the tile and the directions in which operands are read, and launches the kernel.
#pragma once
#include "cuda/linear/contract.cuh"
#include "cuda/linear/contract.h"

namespace mpoe::cuda {

inline int tiles_of(int64_t extent, int tile) { return static_cast<int>((extent + tile - 1) / tile); }

template <class T, class TileT, bool kMajorA, bool kMajorB>
void launch_tiles(const ContractArguments& p, cudaStream_t stream) {
  using A = Staged<T, TileT, TileT::kM, kMajorA>;
  using B = Staged<T, TileT, TileT::kN, kMajorB>;
  const bool in_rows = p.slot_axis == kSlotsInRows;
  const int64_t m = in_rows ? int64_t(p.groups.slots) * p.groups.per_slot : p.m;
  // Every group may end inside a tile; so may the rows that no group owns.
  const int tiles_m = tiles_of(m, TileT::kM) + (in_rows ? p.groups.count + 1 : 0);
  const dim3 grid(static_cast<unsigned>(tiles_m), static_cast<unsigned>(tiles_of(p.n, TileT::kN)),
                  in_rows ? 1u : static_cast<unsigned>(p.groups.count));
  if (m == 0 || p.n == 0) return;
  constexpr std::size_t shared = sizeof(T) * kStages * (A::kElements + B::kElements);
  static_assert(shared >= strip_bytes<TileT>());
  const auto kernel = contract_kernel<T, TileT, kMajorA, kMajorB>;
  LAUNCH(kernel, grid, dim3(TileT::kThreads), shared, stream, p);
  check_launch("contract");
}

template <class T, class TileT>
void launch_directions(const ContractArguments& p, cudaStream_t stream) {
  if (p.a.k_major) {
    p.b.k_major ? launch_tiles<T, TileT, true, true>(p, stream) : launch_tiles<T, TileT, true, false>(p, stream);
  } else {
    p.b.k_major ? launch_tiles<T, TileT, false, true>(p, stream) : launch_tiles<T, TileT, false, false>(p, stream);
  }
}

// Tiles of 128 x 128 read every operand half as often; only 16-bit types have the registers for them.
template <class T>
void launch_contract(const ContractArguments& p, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    const int64_t groups = p.groups.count;
    const int64_t m = p.slot_axis == kSlotsInRows ? int64_t(p.groups.slots) * p.groups.per_slot / groups : p.m;
    if (m >= 128 && p.n >= 128) return launch_directions<T, Tile<T, 128, 128, 32, 64>>(p, stream);
  }
  launch_directions<T, Tile<T, 64, 64, 32, 32>>(p, stream);
}

}  // namespace mpoe::cuda
