// Threads for kernels that know nothing about torch. csrc/bindings/threads.cpp runs them on torch's
// pool; tests/native/cpp/parallel_std.cpp on std::thread, for the sanitizers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mpoe {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls function on disjoint ranges that cover [begin, end), at least `grain` long except for the
// last ones. Nested calls run on the calling thread. Which thread takes which range must not change
// results. The function may throw std::bad_alloc alone: on torch's pool, whatever it throws becomes
// that.
void parallel_range(
    int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

// Threads that parallel_for may use, at least 1.
int num_threads();

// Calls f(begin, end) for ranges that cover [0, count), by all threads.
// Always inlined: files compiled for different instruction sets must not share a copy.
template <class F>
[[gnu::always_inline]] inline void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0)
    return;
  parallel_range(
      0,
      count,
      grain,
      [](int64_t first, int64_t last, void* context) {
        (*static_cast<const F*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The same, f(item) for every item of [0, count).
template <class F>
[[gnu::always_inline]] inline void parallel_for_each(int64_t count, int64_t grain, const F& f) {
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      f(item);
  });
}

// make()(item) for every item, one make() per thread; a thread takes the next item when it is done
// with one.
template <class Make>
void share_out(int64_t items, const Make& make) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(num_threads(), items), 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t item = next++; item < items; item = next++)
      work(item);
  });
}

}  // namespace mpoe
