#include "common/cpu_features.h"

#include <cstdlib>
#include <cstring>

namespace mpoe {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  if (!v3) return Isa::kGeneric;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (!v4) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kGeneric;
#endif
}

Isa choose() {
  const Isa found = detected_isa();
  const char* wanted = std::getenv("MPOE_CPU_ISA");
  if (wanted == nullptr) return found;
  for (int level = 0; level < static_cast<int>(found); ++level)
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<Isa>(level);
  return found;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace mpoe
