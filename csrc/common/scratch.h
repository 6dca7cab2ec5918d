// Consecutive pieces of scratch memory. Part of the bodies of each instruction set; nothing here may
// use inline functions that other files share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mpoe {
namespace {

// A piece that does not fit stops debug builds and those of the sanitizers, which define
// MPOE_CHECKS. Other builds do not look.
#ifdef MPOE_CHECKS
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

// Whoever computes with scratch memory names its pieces in one place, and runs that place twice:
// without memory, to count how much it `used()`, and with as much.
class Scratch {
 public:
  Scratch(float* memory, int64_t size) : memory_(memory), size_(size) {}

  // Uninitialised; in whole cache lines.
  float* raw(int64_t count) {
    const int64_t begin = used_;
    used_ += (count + 15) / 16 * 16;
    if (memory_ == nullptr)
      return nullptr;
    if (kChecked && used_ > size_) {
      std::fprintf(stderr,
                   "scratch memory holds %lld floats; %lld are used\n",
                   static_cast<long long>(size_),
                   static_cast<long long>(used_));
      std::abort();
    }
    return memory_ + begin;
  }
  // Zeros: products read padding.
  float* floats(int64_t count) {
    float* const piece = raw(count);
    if (piece != nullptr)
      std::memset(piece, 0, count * sizeof(float));
    return piece;
  }
  template <class T>
  T* elements(int64_t count) {
    return reinterpret_cast<T*>(floats((count * static_cast<int64_t>(sizeof(T)) + 3) / 4));
  }
  int64_t used() const { return used_; }

 private:
  float* const memory_;
  const int64_t size_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace mpoe
