#include "cpu/linear/half.h"

namespace mpoe {
namespace {

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const BlockDims& d = in.dims;
  if (!zero_the_rest<T>(in))
    return;
  std::vector<int64_t> busy;
  for (int64_t e = 0; e < in.experts; ++e)
    if (in.count(e) > 0)
      busy.push_back(e);
  const HalfPlan plan(gemm, d, in.order.half_first);
  const Buffer<T> central = pack_central<T>(gemm, d, in.central, plan);
  parallel_for(std::ssize(busy), 1, [&](int64_t begin, int64_t end) {
    if (plan.half_first) {
      HalfFirst<T> worker(gemm, in, plan, central.get());
      for (int64_t k = begin; k < end; ++k)
        worker.run(busy[k]);
    } else {
      RightFirst<T> worker(gemm, in, plan, central.get(), in.most_slots());
      for (int64_t k = begin; k < end; ++k)
        worker.run(busy[k]);
    }
  });
}

}  // namespace

void half_left_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) { forward<T>(gemm, in); });
}

}  // namespace mpoe
