// An allocator for LD_PRELOAD: whatever posix_memalign returns (PyTorch's CPU tensors, the kernels'
// buffers) ends at an inaccessible page, so that an access beyond it raises SIGSEGV at the
// offending instruction. Freed memory becomes inaccessible too, and its addresses are not used
// again. New memory is NaN. tools/native_guard.sh builds and uses it.
//
// Between the last byte and the page there is a gap if the alignment requires it (MPOE_GUARD_ALIGN,
// at most the caller's): a write there is detected when the memory is freed, a read is not.
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kReserved = std::size_t{8}
                                  << 40;  // only addresses: memory is allocated when it is written
constexpr unsigned char kGap = 0xA5;      // between the last byte and the page
constexpr unsigned char kNew = 0xFF;      // NaN in every floating dtype

// Stored in the page before the memory, for free() to read.
struct Header {
  std::size_t pages;  // of header, memory and gap
  std::size_t bytes;
};

std::size_t round_up(std::size_t count, std::size_t step) {
  return (count + step - 1) / step * step;
}

[[noreturn]] void fail(const char* what) {
  const ssize_t ignored = write(2, what, std::strlen(what));
  (void)ignored;
  std::abort();
}

std::uintptr_t reserve() {
  void* const base =
      mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    fail("guard pages: no addresses\n");
  return reinterpret_cast<std::uintptr_t>(base);
}

std::uintptr_t first_address() {
  static const std::uintptr_t first = reserve();
  return first;
}

std::atomic<std::size_t> used{0};
std::atomic<bool> started{false};  // before that, nothing is ours

bool is_ours(const void* pointer) {
  if (!started.load(std::memory_order_acquire))
    return false;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  return address >= first_address() && address < first_address() + kReserved;
}

Header* header_of(void* pointer) {
  return reinterpret_cast<Header*>(reinterpret_cast<std::uintptr_t>(pointer) / kPage * kPage -
                                   kPage);
}

std::size_t most_alignment() {
  static const std::size_t most = [] {
    const char* const text = std::getenv("MPOE_GUARD_ALIGN");
    return text == nullptr ? std::size_t{64} : static_cast<std::size_t>(std::atol(text));
  }();
  return most;
}

template <class F>
F next(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

int posix_memalign(void** result, std::size_t alignment, std::size_t bytes) {
  if (alignment > kPage) {  // huge pages: rare and large
    static const auto real = next<int (*)(void**, std::size_t, std::size_t)>("posix_memalign");
    return real(result, alignment, bytes);
  }
  alignment = alignment < most_alignment() ? alignment : most_alignment();
  // A pointer to zero bytes must not point to the next page.
  const std::size_t space = bytes == 0 ? kPage : round_up(bytes, alignment);
  const std::size_t pages = 1 + round_up(space, kPage) / kPage;
  const std::size_t at = used.fetch_add((pages + 1) * kPage);  // one more stays inaccessible
  if (at + (pages + 1) * kPage > kReserved)
    return ENOMEM;
  const std::uintptr_t first = first_address() + at, end = first + pages * kPage;
  if (mprotect(reinterpret_cast<void*>(first), pages * kPage, PROT_READ | PROT_WRITE) != 0)
    return ENOMEM;
  started.store(true, std::memory_order_release);
  const std::uintptr_t start = end - space;
  *reinterpret_cast<Header*>(start / kPage * kPage - kPage) = {pages, bytes};
  std::memset(reinterpret_cast<void*>(start), kNew, bytes);
  std::memset(reinterpret_cast<void*>(start + bytes), kGap, end - start - bytes);
  *result = reinterpret_cast<void*>(start);
  return 0;
}

void free(void* pointer) {
  if (!is_ours(pointer)) {
    static const auto real = next<void (*)(void*)>("free");
    real(pointer);
    return;
  }
  const int kept = errno;
  const Header header = *header_of(pointer);
  const auto start = reinterpret_cast<std::uintptr_t>(pointer);
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(header_of(pointer)),
                       end = first + header.pages * kPage;
  for (std::uintptr_t at = start + header.bytes; at < end; ++at)
    if (*reinterpret_cast<const unsigned char*>(at) != kGap)
      fail("guard pages: written beyond the end of a tensor\n");
  // Mapped again, not only protected: the system then merges it with adjacent inaccessible
  // mappings. Mappings that were in use stay separate, and a process may have 65,530 of them.
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(reinterpret_cast<void*>(first), end - first, PROT_NONE, kFlags, -1, 0) == MAP_FAILED)
    fail("guard pages: a free failed\n");
  errno = kept;
}

std::size_t malloc_usable_size(void* pointer) {
  static const auto real = next<std::size_t (*)(void*)>("malloc_usable_size");
  return is_ours(pointer) ? header_of(pointer)->bytes : real(pointer);
}

void* realloc(void* pointer, std::size_t bytes) {
  static const auto real = next<void* (*)(void*, std::size_t)>("realloc");
  if (!is_ours(pointer))
    return real(pointer, bytes);
  void* const moved = std::malloc(bytes);
  if (moved != nullptr) {
    const std::size_t before = header_of(pointer)->bytes;
    std::memcpy(moved, pointer, before < bytes ? before : bytes);
    free(pointer);
  }
  return moved;
}

}  // extern "C"
