// What the sweeps share. A sweep runs emulated kernels without torch and compares them with loops
// in double precision:
//   sweep_linear|sweep_routing ORDER(ascending|descending|random) COPIES(lazy|eager)
// Exit status: 0 right, 1 wrong values or bank conflicts, 2 the emulator reports an error;
// sanitizers have their own. Blocks have at most 128 threads, as the thread sanitizer sees nothing
// in larger ones.
#pragma once
#include <exception>

#include "emulator/cuda_emulator.h"
#include "native/cpp/check.h"

namespace emu {

template <class F>
int sweep(int count, char** words, F&& body) {
  if (count != 3)
    return 64;
  set_schedule(words[1], words[2]);
#ifdef __SANITIZE_ADDRESS__
  // Once another poison: -1 as a place means that there is no line, which a kernel may check.
  if (config().blocks_descending)
    config().poison = 0x7f;
#endif
  try {
    body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  // Rows of a tile start in different banks: four wavefronts for each load of four matrices.
  mpoe::check::require(stats().ldmatrix_wavefronts == 4 * stats().ldmatrix, "no bank conflicts");
  return mpoe::check::failures == 0 ? 0 : 1;
}

}  // namespace emu
