// CUDA's barriers, shuffles, votes and atomics, on fibers. Errors name the line of the kernel.
#pragma once
#include "fibers.h"

#define threadIdx (::emu::self().tid)
#define blockIdx (::emu::self().block->bid)
#define blockDim (::emu::self().block->dim)
#define gridDim (::emu::self().block->grid)

inline void __syncthreads(emu::Location where = emu::Location::current()) {
  emu::block_barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       emu::Location where = emu::Location::current()) {
  int nothing = 0;
  emu::collective("__syncwarp", mask, nothing, [](void**) {}, where, true);
}
inline void __threadfence() {}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}

namespace emu {

// source(lane) is the lane read from; outside 0..31: the lane's own value.
template <class T, class F>
T shuffle(const char* what, unsigned mask, T value, F source, const Location& where) {
  struct Slot {
    T in;
    T out;
  } slot{value, value};
  collective(
      what,
      mask,
      slot,
      [&](void** slots) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(mask >> lane & 1))
            continue;
          const int other = source(lane);
          Slot& mine = *static_cast<Slot*>(slots[lane]);
          if (other < 0 || other > 31)
            continue;
          if (!(mask >> other & 1))
            fail(std::string(what) + " at " + line_of(where) + " reads a lane outside the mask");
          mine.out = static_cast<Slot*>(slots[other])->in;
        }
      },
      where);
  return slot.out;
}

// Lanes of `mask` for whose value, beside the caller's, `counts` says yes.
template <class F>
unsigned vote(const char* what, unsigned mask, int value, F counts, const Location& where) {
  struct Slot {
    int in;
    unsigned out;
  } slot{value, 0};
  collective(
      what,
      mask,
      slot,
      [&](void** slots) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(mask >> lane & 1))
            continue;
          Slot& mine = *static_cast<Slot*>(slots[lane]);
          for (int other = 0; other < 32; ++other) {
            if ((mask >> other & 1) && counts(mine.in, static_cast<Slot*>(slots[other])->in))
              mine.out |= 1u << other;
          }
        }
      },
      where);
  return slot.out;
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask,
              T value,
              int source,
              int width = 32,
              emu::Location where = emu::Location::current()) {
  return emu::shuffle(
      "__shfl_sync",
      mask,
      value,
      [=](int lane) { return (lane & ~(width - 1)) | (source & (width - 1)); },
      where);
}
template <class T>
T __shfl_xor_sync(unsigned mask,
                  T value,
                  int bits,
                  int width = 32,
                  emu::Location where = emu::Location::current()) {
  return emu::shuffle(
      "__shfl_xor_sync",
      mask,
      value,
      [=](int lane) {
        return ((lane ^ bits) & ~(width - 1)) > (lane & ~(width - 1)) ? -1 : lane ^ bits;
      },
      where);
}
template <class T>
T __shfl_up_sync(unsigned mask,
                 T value,
                 unsigned by,
                 int width = 32,
                 emu::Location where = emu::Location::current()) {
  return emu::shuffle(
      "__shfl_up_sync",
      mask,
      value,
      [=](int lane) {
        return lane - static_cast<int>(by) < (lane & ~(width - 1)) ? -1
                                                                   : lane - static_cast<int>(by);
      },
      where);
}
template <class T>
T __shfl_down_sync(unsigned mask,
                   T value,
                   unsigned by,
                   int width = 32,
                   emu::Location where = emu::Location::current()) {
  return emu::shuffle(
      "__shfl_down_sync",
      mask,
      value,
      [=](int lane) {
        const int other = lane + static_cast<int>(by);
        return (other & ~(width - 1)) != (lane & ~(width - 1)) ? -1 : other;
      },
      where);
}
inline unsigned __ballot_sync(unsigned mask,
                              int predicate,
                              emu::Location where = emu::Location::current()) {
  return emu::vote(
      "__ballot_sync", mask, predicate, [](int, int other) { return other != 0; }, where);
}
// Lanes of `mask` whose value equals the caller's.
inline unsigned __match_any_sync(unsigned mask,
                                 int value,
                                 emu::Location where = emu::Location::current()) {
  return emu::vote(
      "__match_any_sync", mask, value, [](int mine, int other) { return mine == other; }, where);
}
inline int __popc(unsigned bits) {
  return std::popcount(bits);
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*p).fetch_add(value, std::memory_order_relaxed);
}
