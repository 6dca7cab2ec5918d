// How tests/cuda/emulation.py controls the emulator, through ctypes: schedules, limits of the device and counters.
// The kernels themselves are the ops of bindings.cpp, compiled into the same library.
#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

// Which ready thread runs next (blocks in the same order), a value of emu::Order; whether cp.async copies at the wait
// or at issue.
EMU_EXPORT void emu_configure(int order, int lazy_copies, std::uint64_t seed) {
  auto& config = emu::config();
  config.order = static_cast<emu::Order>(order);
  config.blocks_descending = config.order == emu::Order::kDescending;
  config.cp_async_lazy = lazy_copies;
  config.seed = seed;
}

// The limits of the device; 0: the usual one.
EMU_EXPORT void emu_limit(std::size_t shared_bytes, int multiprocessors, int cache_bytes) {
  const emu::Config usual;
  emu::config().max_shared = shared_bytes ? shared_bytes : usual.max_shared;
  emu::config().multiprocessors = multiprocessors ? multiprocessors : usual.multiprocessors;
  emu::config().cache = cache_bytes ? cache_bytes : usual.cache;
}

// The counts since the last call, in the order of emu::Stats.
EMU_EXPORT void emu_counters(std::uint64_t* counts) {
  auto& stats = emu::stats();
  const std::uint64_t all[] = {
      stats.launches, stats.mma, stats.ldmatrix, stats.ldmatrix_wavefronts, stats.cp_async};
  std::copy(std::begin(all), std::end(all), counts);
  stats = {};
}
