// parallel.h on torch's thread pool.
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"

namespace mpoe {

void parallel_range(std::int64_t begin, std::int64_t end, std::int64_t grain, RangeFunction function, void* context) {
  torch::stable::parallel_for(
      begin, end, grain, [=](std::int64_t first, std::int64_t last) { function(first, last, context); });
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace mpoe
