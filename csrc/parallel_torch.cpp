// parallel.h on torch's thread pool. The loader passes in torch's functions, so nothing here links to torch or OpenMP:
// the process has a single pool, of torch.set_num_threads threads, and nested calls are recognized.
#include <atomic>
#include <new>

#include "common/parallel.h"
#include "interface.h"

namespace mpoe {
namespace {

int sequential_for(
    std::int64_t begin, std::int64_t end, std::int64_t, void (*function)(std::int64_t, std::int64_t, void*),
    void* context) {
  function(begin, end, context);
  return 0;
}

int one_thread(std::uint32_t* count) {
  *count = 1;
  return 0;
}

std::atomic<MpoeParallelFor> parallel_for_of_torch = sequential_for;
std::atomic<MpoeGetNumThreads> num_threads_of_torch = one_thread;

}  // namespace

void parallel_range(std::int64_t begin, std::int64_t end, std::int64_t grain, RangeFunction function, void* context) {
  // It fails only if `function` throws.
  if (parallel_for_of_torch.load(std::memory_order_relaxed)(begin, end, grain, function, context) != 0)
    throw std::bad_alloc();
}

int num_threads() {
  std::uint32_t count = 1;
  num_threads_of_torch.load(std::memory_order_relaxed)(&count);
  return static_cast<int>(count);
}

}  // namespace mpoe

extern "C" void mpoe_use_threads(MpoeParallelFor parallel_for, MpoeGetNumThreads get_num_threads) {
  mpoe::parallel_for_of_torch = parallel_for;
  mpoe::num_threads_of_torch = get_num_threads;
}
