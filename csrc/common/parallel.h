// Threads for kernels that know nothing about torch. csrc/parallel_torch.cpp runs them on torch's pool;
// tests/native/cpp/parallel_std.cpp on std::thread, for the sanitizers.
#pragma once

#include <cstdint>

namespace mpoe {

using RangeFunction = void (*)(std::int64_t begin, std::int64_t end, void* context);

// Calls function on disjoint ranges that cover [begin, end), at least `grain` long except for the last ones.
// Nested calls run on the calling thread. Which thread takes which range must not change results.
// The function must not throw.
void parallel_range(std::int64_t begin, std::int64_t end, std::int64_t grain, RangeFunction function, void* context);

// Threads that parallel_for may use, at least 1.
int num_threads();

// parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { ... });
// Always inlined: files compiled for different instruction sets must not share a copy.
template <class F>
[[gnu::always_inline]] inline void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, const F& f) {
  if (begin >= end) return;
  parallel_range(
      begin, end, grain,
      [](std::int64_t first, std::int64_t last, void* context) { (*static_cast<const F*>(context))(first, last); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace mpoe
