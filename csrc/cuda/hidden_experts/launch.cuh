// Chooses the tiles of tokens and launches the kernels.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda/linear/contract.h"
#include "cuda/hidden_experts/cores.cuh"
#include "cuda/hidden_experts/launch.h"

namespace mpoe::cuda {

inline unsigned hidden_blocks_of(int64_t extent, int block) { return static_cast<unsigned>((extent + block - 1) / block); }

// Bytes of shared memory; no memory is accessed.
template <class T>
std::size_t hidden_bytes(const HiddenArguments& p, HiddenKernel kernel) {
  return HiddenShared<T>(p, kernel, reinterpret_cast<void*>(std::uintptr_t{256})).bytes;
}

template <class T>
std::size_t fitting_bytes(const HiddenArguments& p, HiddenKernel kernel, std::size_t limit) {
  const std::size_t bytes = hidden_bytes<T>(p, kernel);
  if (bytes > limit) {
    throw std::invalid_argument("a block of " + std::to_string(p.block) + " hidden units needs " + std::to_string(bytes) +
                                " bytes of shared memory; the device has " + std::to_string(limit));
  }
  return bytes;
}

// The more tokens in a tile, the fewer times the blocks are read; but every multiprocessor should have a tile.
template <class T>
void choose_tile(HiddenArguments& p, HiddenKernel kernel, const dev::Limits& limits) {
  constexpr int kMost = sizeof(T) == 2 ? 128 : 64, kLeast = 16;
  const auto shrink = [&] {
    if (p.tile_tokens == 1) return false;
    if (p.entries() > kHiddenEntries || hidden_bytes<T>(p, kernel) > limits.shared_bytes) return true;
    const int64_t tiles = int64_t(hidden_blocks_of(p.tokens, p.tile_tokens)) * p.groups;
    return p.tile_tokens > kLeast && (tiles < limits.multiprocessors || p.tokens <= p.tile_tokens / 2);
  };
  p.tile_tokens = kMost;
  while (shrink()) p.tile_tokens /= 2;
  if (p.entries() > kHiddenEntries) {
    throw std::invalid_argument("hidden_experts takes at most " + std::to_string(kHiddenEntries) +
                                " experts per token; got " + std::to_string(p.top_k));
  }
  p.tiles = static_cast<int>(hidden_blocks_of(p.tokens, p.tile_tokens));
}

template <class T>
void launch_hidden(HiddenArguments p, const HiddenSums& sums, cudaStream_t stream) {
  const dev::Limits limits = dev::limits();
  p.stride = padded_stride<T>(p.padded, true);
  if (p.out) {
    choose_tile<T>(p, HiddenKernel::kForward, limits);
    const std::size_t bytes = fitting_bytes<T>(p, HiddenKernel::kForward, limits.shared_bytes);
    if (p.tiles == 0) return;
    LAUNCH(hidden_forward_kernel<T>, dim3(static_cast<unsigned>(p.groups * p.tiles)), dim3(kHiddenThreads), bytes, stream, p);
    return check_launch("hidden_forward");
  }
  const bool cores = p.dright || p.dright_gate || p.dleft || p.dbias;
  choose_tile<T>(p, HiddenKernel::kRows, limits);
  const std::size_t bytes = fitting_bytes<T>(p, HiddenKernel::kRows, limits.shared_bytes);
  if (!p.du && !p.du_gate && !p.gate_parts) p.tiles = 0;
  if (p.tiles > 0 || cores) {
    const int blocks = p.groups * p.tiles + (cores ? p.experts : 0);
    LAUNCH(hidden_rows_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kHiddenThreads), bytes, stream, p);
    check_launch("hidden_rows");
  }
  if (cores) {
    const std::size_t own = fitting_bytes<T>(p, HiddenKernel::kCores, limits.shared_bytes);
    LAUNCH(hidden_cores_kernel<T>, dim3(static_cast<unsigned>(p.experts * p.shares)), dim3(kHiddenThreads), own, stream, p);
    check_launch("hidden_cores");
  }
  int64_t largest = 0;
  for (const HiddenSum& sum : sums.of) largest = sum.size > largest ? sum.size : largest;
  if (largest == 0) return;
  LAUNCH(hidden_sums_kernel<T>, dim3(hidden_blocks_of(largest, kHiddenThreads), 4), dim3(kHiddenThreads), 0, stream, sums);
  check_launch("hidden_sums");
}

}  // namespace mpoe::cuda
