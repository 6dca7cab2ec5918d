// How tests/cuda/emulation.py controls the emulator, through ctypes: schedules and counters.
// The kernels themselves are the ops of bindings.cpp, compiled into the same library.
#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

// Which ready thread runs next (blocks in the same order), a value of emu::Order; whether cp.async
// copies at the wait or at issue.
EMU_EXPORT void emu_configure(int order, int lazy_copies, std::uint64_t seed) {
  auto& config = emu::config();
  config.order = static_cast<emu::Order>(order);
  config.blocks_descending = config.order == emu::Order::kDescending;
  config.cp_async_lazy = lazy_copies;
  config.seed = seed;
}

// The counts since the last call, in the order of emu::Stats.
EMU_EXPORT void emu_counters(std::uint64_t* counts) {
  auto& stats = emu::stats();
  const std::uint64_t all[] = {
      stats.launches, stats.mma, stats.ldmatrix, stats.ldmatrix_wavefronts, stats.cp_async};
  std::copy(std::begin(all), std::end(all), counts);
  stats = {};
}
