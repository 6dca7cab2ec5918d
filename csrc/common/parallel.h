// Threads for kernels that know nothing about torch. csrc/parallel_torch.cpp runs them on torch's
// pool; tests/native/cpp/parallel_std.cpp on std::thread, for the sanitizers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mpoe {

using RangeFunction = void (*)(std::int64_t begin, std::int64_t end, void* context);

// Calls function on disjoint ranges that cover [begin, end), at least `grain` long except for the
// last ones. Nested calls run on the calling thread. Which thread takes which range must not change
// results. The function must not throw.
void parallel_range(std::int64_t begin,
                    std::int64_t end,
                    std::int64_t grain,
                    RangeFunction function,
                    void* context);

// Threads that parallel_for may use, at least 1.
int num_threads();

// parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { ... });
// Always inlined: files compiled for different instruction sets must not share a copy.
template <class F>
[[gnu::always_inline]] inline void parallel_for(std::int64_t begin,
                                                std::int64_t end,
                                                std::int64_t grain,
                                                const F& f) {
  if (begin >= end)
    return;
  parallel_range(
      begin,
      end,
      grain,
      [](std::int64_t first, std::int64_t last, void* context) {
        (*static_cast<const F*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// make()(item) for every item, one make() per thread; a thread takes the next item when it is done
// with one.
template <class Make>
void share_out(std::int64_t items, const Make& make) {
  std::atomic<std::int64_t> next{0};
  parallel_for(0, std::min<std::int64_t>(num_threads(), items), 1, [&](std::int64_t, std::int64_t) {
    auto work = make();
    for (std::int64_t item = next++; item < items; item = next++)
      work(item);
  });
}

}  // namespace mpoe
