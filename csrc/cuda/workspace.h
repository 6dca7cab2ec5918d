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

  bool measuring() const { return measuring_; }
  std::size_t peak() const { return peak_; }

  void* take(std::size_t bytes) {
    const std::size_t at = used_;
    used_ += (bytes + 255) / 256 * 256;
    if (used_ > peak_) peak_ = used_;
    // While measuring: some aligned address that nothing reads.
    return measuring_ ? reinterpret_cast<void*>(at + 256) : base_ + at;
  }

  // Releases what was taken during its lifetime.
  class Scope {
   public:
    explicit Scope(Workspace& workspace) : workspace_(workspace), mark_(workspace.used_) {}
    ~Scope() { workspace_.used_ = mark_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    std::size_t mark_;
  };

 private:
  char* base_ = nullptr;
  bool measuring_ = true;
  std::size_t used_ = 0, peak_ = 0;
};

}  // namespace mpoe::cuda
