#include "common/cpu_features.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mpoe {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

// Whether the processor has AMX for bfloat16 and Linux lets this process and its threads use its 8
// KB of registers.
[[maybe_unused]] bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned int a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned int kTileAndBf16 = 1u << 24 | 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTileAndBf16) != kTileAndBf16)
    return false;
  constexpr int kRequestPermission = 0x1023,
                kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("popcnt");
  if (!v3)
    return Isa::kGeneric;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (!v4)
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16"))
    return Isa::kAvx512;
  return amx_granted() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kGeneric;
#endif
}

Isa choose() {
  const Isa found = detected_isa();
  const char* wanted = std::getenv("MPOE_CPU_ISA");
  if (wanted == nullptr)
    return found;
  for (int level = 0; level < static_cast<int>(found); ++level)
    if (std::strcmp(wanted, kNames[level]) == 0)
      return static_cast<Isa>(level);
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

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

}  // namespace mpoe
