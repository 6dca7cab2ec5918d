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

// Uninitialised memory aligned to cache lines. On Linux, large buffers are the system's, with huge pages if it grants
// them, and go back to it: the C library would keep them resident beside what torch allocates next.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + 64;
    void* memory = nullptr;
#if defined(__linux__)
    if (bytes >= 4 << 20) {
      mapped_ = bytes;
      memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      madvise(memory, mapped_, MADV_HUGEPAGE);  // a hint: failure changes nothing
      data_ = static_cast<T*>(memory);
      return;
    }
#endif
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~Buffer() {
#if defined(__linux__)
    if (mapped_ != 0) {
      munmap(data_, mapped_);
      return;
    }
#endif
    std::free(data_);
  }
  T* get() { return data_; }
  const T* get() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
  std::size_t mapped_ = 0;  // bytes of the system's memory
};

template <class T>
inline Buffer<T> zeros(std::int64_t count) {
  Buffer<T> buffer(count);
  std::fill_n(buffer.get(), count, T{});
  return buffer;
}

}  // namespace mpoe
