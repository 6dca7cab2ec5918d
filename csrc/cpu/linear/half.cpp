#include "cpu/linear/half.h"

namespace mpoe {
namespace {

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const BlockDims& d = in.dims;
  if (!zero_the_rest<T>(in))
    return;
  std::vector<std::int64_t> busy;
  std::int64_t most = 0;
  for (std::int64_t e = 0; e < in.experts; ++e) {
    const std::int64_t count = in.offsets[e + 1] - in.offsets[e];
    if (count > 0)
      busy.push_back(e);
    most = std::max(most, count);
  }
  const HalfPlan plan(gemm, d, in.order.half_first);
  const Buffer<T> central = pack_central<T>(gemm, d, in.central, plan);
  parallel_for(
      0, static_cast<std::int64_t>(busy.size()), 1, [&](std::int64_t begin, std::int64_t end) {
        if (plan.half_first) {
          HalfFirst<T> worker(gemm, in, plan, central.get());
          for (std::int64_t k = begin; k < end; ++k)
            worker.run(busy[k]);
        } else {
          RightFirst<T> worker(gemm, in, plan, central.get(), most);
          for (std::int64_t k = begin; k < end; ++k)
            worker.run(busy[k]);
        }
      });
}

}  // namespace

void half_left_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) { forward<T>(gemm, in); });
}

}  // namespace mpoe
