// Twins of the instructions in csrc/cuda/device.cuh (mma.sync, ldmatrix, cp.async), after the
// fragment tables of NVIDIA's "Parallel Thread Execution ISA", chapter "Warp-level matrix
// instructions". tests/device/test_device_instructions.py compares them with hardware.
#pragma once
#include "intrinsics.h"

namespace dev {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline float half_of(std::uint32_t pair, int which, bf16) {
  return std::bit_cast<float>(which ? pair & 0xffff0000u : pair << 16);
}
inline float half_of(std::uint32_t pair, int which, fp16) {
  return __half2float({static_cast<std::uint16_t>(which ? pair >> 16 : pair)});
}

struct MmaSlot {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

// D[16 x 8] += A[16 x K] B[K x 8]; `spread` writes a lane's fragments into the matrices.
template <int K, class Spread>
void mma_twin(float (&d)[4],
              const std::uint32_t* a,
              const std::uint32_t* b,
              Spread spread,
              const emu::Location& where) {
  MmaSlot slot{d, a, b};
  emu::collective(
      "mma.sync",
      0xffffffffu,
      slot,
      [&](void** slots) {
        float A[16][K];
        float B[K][8];
        for (int lane = 0; lane < 32; ++lane) {
          spread(*static_cast<MmaSlot*>(slots[lane]), lane >> 2, lane & 3, A, B);
        }
        for (int lane = 0; lane < 32; ++lane) {
          float* out = static_cast<MmaSlot*>(slots[lane])->d;
          const int g = lane >> 2;
          const int t = lane & 3;
          for (int e = 0; e < 4; ++e) {
            const int row = g + (e >> 1) * 8;
            const int column = t * 2 + (e & 1);
            float sum = 0;
            for (int k = 0; k < K; ++k)
              sum += A[row][k] * B[k][column];
            out[e] += sum;
          }
        }
        ++emu::stats().mma;
      },
      where);
}

template <class T>
void mma_m16n8k16(float (&d)[4],
                  const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2],
                  emu::Location where = emu::Location::current()) {
  mma_twin<16>(
      d,
      a,
      b,
      [](const MmaSlot& s, int g, int t, float (&A)[16][16], float (&B)[16][8]) {
        for (int e = 0; e < 2; ++e) {
          A[g][t * 2 + e] = half_of(s.a[0], e, T{});
          A[g + 8][t * 2 + e] = half_of(s.a[1], e, T{});
          A[g][t * 2 + 8 + e] = half_of(s.a[2], e, T{});
          A[g + 8][t * 2 + 8 + e] = half_of(s.a[3], e, T{});
          B[t * 2 + e][g] = half_of(s.b[0], e, T{});
          B[t * 2 + 8 + e][g] = half_of(s.b[1], e, T{});
        }
      },
      where);
}

using Shared = std::uintptr_t;
inline Shared shared_address(const void* p) {
  return reinterpret_cast<Shared>(p);
}

template <bool kTransposed>
void ldmatrix_twin(std::uint32_t (&r)[4], Shared row, const emu::Location& where) {
  if (row & 15) {
    emu::fail("ldmatrix at " + emu::line_of(where) + ": row address is not 16-byte aligned");
  }
  struct Slot {
    std::uint16_t values[8];
    std::uintptr_t address;
    std::uint32_t* out;
  } slot;
  slot.address = row;
  slot.out = r;
  for (int i = 0; i < 8; ++i)
    slot.values[i] = reinterpret_cast<const std::uint16_t*>(row)[i];  // for sanitizers
  emu::collective(
      kTransposed ? "ldmatrix.trans" : "ldmatrix",
      0xffffffffu,
      slot,
      [](void** slots) {
        const auto at = [&](int i) -> Slot& {
          return *static_cast<Slot*>(slots[i]);
        };
        std::uint64_t wavefronts = 0;
        for (int m = 0; m < 4; ++m) {
          int load[8] = {}, most = 0;  // rows per group of four banks
          for (int i = 0; i < 8; ++i) {
            int& count = load[at(m * 8 + i).address >> 4 & 7];
            most = ++count > most ? count : most;
          }
          wavefronts += static_cast<std::uint64_t>(most);
          for (int lane = 0; lane < 32; ++lane) {
            const int i = lane >> 2;
            const int j = (lane & 3) * 2;
            const std::uint32_t low =
                kTransposed ? at(m * 8 + j).values[i] : at(m * 8 + i).values[j];
            const std::uint32_t high =
                kTransposed ? at(m * 8 + j + 1).values[i] : at(m * 8 + i).values[j + 1];
            at(lane).out[m] = low | high << 16;
          }
        }
        ++emu::stats().ldmatrix;
        emu::stats().ldmatrix_wavefronts += wavefronts;
      },
      where);
}
inline void ldmatrix_x4(std::uint32_t (&r)[4],
                        Shared row,
                        emu::Location where = emu::Location::current()) {
  ldmatrix_twin<false>(r, row, where);
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4],
                              Shared row,
                              emu::Location where = emu::Location::current()) {
  ldmatrix_twin<true>(r, row, where);
}

inline void do_copy(
    const emu::AsyncCopy& copy) {  // element by element, so that sanitizers see every access
  auto* to = static_cast<std::uint16_t*>(copy.to);
  const auto* from = static_cast<const std::uint16_t*>(copy.from);
  for (int i = 0; i < 8; ++i)
    to[i] = copy.there ? from[i] : std::uint16_t(0);
}
inline void cp_async16(Shared shared,
                       const void* global,
                       bool there,
                       emu::Location where = emu::Location::current()) {
  if ((shared | reinterpret_cast<std::uintptr_t>(global)) & 15) {
    emu::fail("cp.async at " + emu::line_of(where) + ": address is not 16-byte aligned");
  }
  const emu::AsyncCopy copy{reinterpret_cast<void*>(shared), global, there};
  {
    emu::Quiet quiet;
    ++emu::stats().cp_async;
  }
  if (emu::config().cp_async_lazy) {
    emu::Quiet quiet;
    emu::self().open.push_back(copy);
  } else {
    do_copy(copy);
  }
}
inline void cp_async_commit() {
  emu::Quiet quiet;
  auto& fiber = emu::self();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& fiber = emu::self();
  while (static_cast<int>(fiber.groups.size()) > kPending) {
    std::vector<emu::AsyncCopy> group;
    {
      emu::Quiet quiet;
      group = std::move(fiber.groups.front());
      fiber.groups.erase(fiber.groups.begin());
    }
    for (const auto& copy : group)
      do_copy(copy);
  }
}

}  // namespace dev
