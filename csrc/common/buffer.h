// Scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mpoe {

// Uninitialised memory aligned to cache lines. On Linux, large buffers get huge pages if the system
// grants them on request.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    constexpr std::size_t kHugePage = 2 << 20;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + 64;
    const bool large = bytes >= 2 * kHugePage;
    void* memory = nullptr;
    if (posix_memalign(&memory, large ? kHugePage : 64, bytes) != 0)
      throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
#if defined(__linux__)
    if (large)
      madvise(
          data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  T* get() { return data_; }
  const T* get() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
};

template <class T>
inline Buffer<T> zeros(int64_t count) {
  Buffer<T> buffer(count);
  std::fill_n(buffer.get(), count, T{});
  return buffer;
}

}  // namespace mpoe
