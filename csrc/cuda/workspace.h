// Scratch memory of one call as a stack. The same code runs once without memory to measure how much it needs.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpoe::cuda {

class Workspace {
 public:
  // Without memory: nothing may be launched; only `peak` is wanted.
  Workspace() = default;
  explicit Workspace(void* base) : base_(static_cast<char*>(base)), measuring_(false) {}

  std::size_t peak() const { return peak_; }

  void* take(std::size_t bytes) {
    const std::size_t at = used_;
    used_ += (bytes + 255) / 256 * 256;
    if (used_ > peak_) peak_ = used_;
    // While measuring: some aligned address that nothing reads.
    return measuring_ ? reinterpret_cast<void*>(at + 256) : base_ + at;
  }

 private:
  char* base_ = nullptr;
  bool measuring_ = true;
  std::size_t used_ = 0, peak_ = 0;
};

}  // namespace mpoe::cuda
