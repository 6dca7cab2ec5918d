// CUDA's barriers, shuffles, votes and atomics, on fibers. Errors name the line of the kernel.
#pragma once
#include "fibers.h"

#define threadIdx (::emu::self().tid)
#define blockIdx (::emu::self().block->bid)

inline void __syncthreads(emu::Location where = emu::Location::current()) {
  emu::block_barrier(where);
}
namespace emu {

// Every lane of a warp gives a value; each gets f(lane, in), where in(other) is another's value.
template <class Result, class T, class F>
Result exchange(const char* what, unsigned mask, T value, F f, const Location& where) {
  struct Slot {
    T in;
    Result out;
  } slot{value, {}};
  collective(
      what,
      mask,
      slot,
      [&](void** slots) {
        const auto in = [&](int lane) {
          return static_cast<Slot*>(slots[lane])->in;
        };
        for (int lane = 0; lane < 32; ++lane)
          static_cast<Slot*>(slots[lane])->out = f(lane, in);
      },
      where);
  return slot.out;
}

// The lanes for whose value, beside the caller's, `counts` says yes.
template <class F>
unsigned vote(const char* what, unsigned mask, int value, F counts, const Location& where) {
  return exchange<unsigned>(
      what,
      mask,
      value,
      [=](int lane, const auto& in) {
        unsigned votes = 0;
        for (int other = 0; other < 32; ++other)
          votes |= unsigned(counts(in(lane), in(other))) << other;
        return votes;
      },
      where);
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, emu::Location where = emu::Location::current()) {
  return emu::exchange<T>(
      "__shfl_sync", mask, value, [=](int, const auto& in) { return in(source & 31); }, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask,
                  T value,
                  int bits,
                  emu::Location where = emu::Location::current()) {
  return emu::exchange<T>(
      "__shfl_xor_sync",
      mask,
      value,
      [=](int lane, const auto& in) { return in(lane ^ bits); },
      where);
}
template <class T>
T __shfl_up_sync(unsigned mask,
                 T value,
                 unsigned by,
                 emu::Location where = emu::Location::current()) {
  return emu::exchange<T>(
      "__shfl_up_sync",
      mask,
      value,
      [=](int lane, const auto& in) {
        const int below = lane - static_cast<int>(by);
        return in(below < 0 ? lane : below);
      },
      where);
}
inline unsigned __ballot_sync(unsigned mask,
                              int predicate,
                              emu::Location where = emu::Location::current()) {
  return emu::vote(
      "__ballot_sync", mask, predicate, [](int, int other) { return other != 0; }, where);
}
// The lanes whose value equals the caller's.
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
