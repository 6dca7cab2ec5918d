// What the sanitizers need to know about fibers; no-ops without them.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define EMU_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMU_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif

#if EMU_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define EMU_NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define EMU_NO_TSAN
#endif
#if EMU_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, std::size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*);
void __asan_unpoison_memory_region(const void volatile*, std::size_t);
}
#endif

namespace emu {

#if EMU_TSAN
struct Quiet {  // the emulator's own bookkeeping is not an access by the kernel
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
inline void tsan_acquire(void* tag) {
  __tsan_acquire(tag);
}
inline void tsan_release(void* tag) {
  __tsan_release(tag);
}
EMU_NO_TSAN inline void tsan_switch(void* fiber) {
  __tsan_switch_to_fiber(fiber, 1);
}  // 1: no ordering
inline void* tsan_current() {
  return __tsan_get_current_fiber();
}
inline void* tsan_create() {
  return __tsan_create_fiber(0);
}
inline void tsan_destroy(void* fiber) {
  __tsan_destroy_fiber(fiber);
}
#else
struct Quiet {
  Quiet() {}
  ~Quiet() {}
};
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void tsan_switch(void*) {}
inline void* tsan_current() {
  return nullptr;
}
inline void* tsan_create() {
  return nullptr;
}
inline void tsan_destroy(void*) {}
#endif

#if EMU_ASAN
inline void asan_leave(void** fake, const void* stack, std::size_t bytes) {
  __sanitizer_start_switch_fiber(fake, stack, bytes);
}
inline void asan_arrive(void* fake, const void** stack, std::size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
}
inline void asan_fresh(void* stack, std::size_t bytes) {
  __asan_unpoison_memory_region(stack, bytes);
}
#else
inline void asan_leave(void**, const void*, std::size_t) {}
inline void asan_arrive(void*, const void**, std::size_t*) {}
inline void asan_fresh(void*, std::size_t) {}
#endif

}  // namespace emu
