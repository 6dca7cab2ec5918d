// Compiles csrc/cuda for the host and runs it there: csrc/cuda/device.cuh includes this under
// MPOE_CUDA_EMULATED.
#pragma once
#include "fibers.h"      // scheduling, barriers
#include "intrinsics.h"  // what CUDA C++ offers
#include "twins.h"       // what device.cuh offers

namespace emu {
std::vector<char*>& stack_pool();
}
