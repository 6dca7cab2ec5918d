// Which instruction set this processor has, for run-time dispatch to files compiled with more than
// the baseline.
#pragma once

namespace mpoe {

// Each level includes those before it. On architectures other than x86-64 only kGeneric exists.
enum class Isa : int {
  kGeneric = 0,     // the architecture's baseline (x86-64, ARMv8 with NEON, ...)
  kAvx2 = 1,        // *_avx2.cpp: x86-64-v3
  kAvx512 = 2,      // *_avx512.cpp: x86-64-v4 (F, BW, CD, DQ, VL)
  kAvx512Bf16 = 3,  // *_avx512bf16.cpp: the above + BF16
  kAmx =
      4,  // *_amx.cpp: the above + AMX-TILE and AMX-BF16; Linux only: it must grant their registers
};

// What the processor and the operating system support. Cached.
Isa detected_isa();

// What kernels use: detected_isa(), lowered by the environment variable MPOE_CPU_ISA
// (generic, avx2, avx512, avx512bf16, amx; read once). Cached.
Isa active_isa();

const char* isa_name(Isa isa);

// Of four tables of kernels, whose names end as the files for which they are compiled, the one in
// use.
#if defined(__x86_64__)
#define MPOE_TABLE_IN_USE(name)                        \
  (active_isa() >= Isa::kAvx512Bf16 ? name##Avx512Bf16 \
   : active_isa() >= Isa::kAvx512   ? name##Avx512     \
   : active_isa() >= Isa::kAvx2     ? name##Avx2       \
                                    : name##Generic)
#else
#define MPOE_TABLE_IN_USE(name) name##Generic
#endif

}  // namespace mpoe
