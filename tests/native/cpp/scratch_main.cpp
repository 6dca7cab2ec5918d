// One buffer more than the kernels of experts count: with MPOE_CHECKS, as debug builds and those of
// the sanitizers have it, the program stops where the buffer is taken. Returns 3 where nobody looks.
#include "common/buffer.h"
#include "common/scratch.h"

int main() {
  using mpoe::Scratch;
  Scratch counted(nullptr, 0);
  counted.raw(20);
  counted.floats(16);
  mpoe::Buffer<float> memory(counted.used());
  Scratch scratch(memory.get(), counted.used());
  scratch.raw(20);
  float* const last = scratch.floats(16);
  if (scratch.used() != 48 || last != memory.get() + 32 || last[15] != 0)
    return 2;
  scratch.raw(1);
  return 3;
}
