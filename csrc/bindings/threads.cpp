// common/parallel.h on torch's thread pool. The loader passes in torch's functions, so nothing here
// links to torch or OpenMP: the process has a single pool, of torch.set_num_threads threads, and
// nested calls are recognized.
#include <atomic>
#include <new>

#include "bindings/bindings.h"
#include "common/parallel.h"

namespace mpoe {
namespace {

// The types of torch_parallel_for and torch_get_num_threads, of torch's stable C interface.
using TorchParallelFor =
    int (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context);
using TorchGetNumThreads = int (*)(uint32_t* count);

int sequential_for(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  function(begin, end, context);
  return 0;
}

int one_thread(uint32_t* count) {
  *count = 1;
  return 0;
}

std::atomic<TorchParallelFor> parallel_for_of_torch = sequential_for;
std::atomic<TorchGetNumThreads> num_threads_of_torch = one_thread;

}  // namespace

void parallel_range(
    int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  // It fails only if `function` throws.
  if (parallel_for_of_torch.load(std::memory_order_relaxed)(begin, end, grain, function, context) !=
      0)
    throw std::bad_alloc();
}

int num_threads() {
  uint32_t count = 1;
  num_threads_of_torch.load(std::memory_order_relaxed)(&count);
  return static_cast<int>(count);
}

// use_threads(parallel_for, get_num_threads): addresses of torch's functions. To be called before
// any kernel.
void bind_threads(pybind11::module_& module) {
  module.def("use_threads", [](std::uintptr_t parallel_for, std::uintptr_t get_num_threads) {
    parallel_for_of_torch = reinterpret_cast<TorchParallelFor>(parallel_for);
    num_threads_of_torch = reinterpret_cast<TorchGetNumThreads>(get_num_threads);
  });
}

}  // namespace mpoe
