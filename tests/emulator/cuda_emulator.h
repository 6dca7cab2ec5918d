// Compiles csrc/cuda for the host and runs it there: csrc/cuda/device.cuh includes this under
// MPOE_CUDA_EMULATED.
#pragma once
#include "fibers.h"      // scheduling, barriers
#include "intrinsics.h"  // what CUDA C++ offers
#include "twins.h"       // what device.cuh offers

namespace emu {

// As command lines name them: ascending, descending or random; lazy or eager.
inline void set_schedule(const std::string& order, const std::string& copies) {
  config().order = order == "ascending"    ? Order::kAscending
                   : order == "descending" ? Order::kDescending
                                           : Order::kRandom;
  config().blocks_descending = order == "descending";
  config().cp_async_lazy = copies == "lazy";
}

}  // namespace emu
