// parallel.h on std::thread, which the thread sanitizer understands.
#include <algorithm>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace mpoe {
namespace {

int threads = 1;
thread_local bool inside = false;

}  // namespace

void set_threads(int count) {
  threads = count;
}

int num_threads() {
  return threads;
}

void parallel_range(std::int64_t begin,
                    std::int64_t end,
                    std::int64_t grain,
                    RangeFunction function,
                    void* context) {
  const std::int64_t count = end - begin;
  const std::int64_t most =
      inside ? 1 : std::min<std::int64_t>(threads, count / std::max<std::int64_t>(1, grain));
  if (most <= 1) {
    function(begin, end, context);
    return;
  }
  std::vector<std::thread> workers;
  for (std::int64_t part = 0; part < most; ++part)
    workers.emplace_back([=] {
      inside = true;
      function(begin + count * part / most, begin + count * (part + 1) / most, context);
    });
  for (std::thread& worker : workers)
    worker.join();
}

}  // namespace mpoe
