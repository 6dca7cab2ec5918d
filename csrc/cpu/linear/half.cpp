#include "cpu/linear/half.h"

namespace mpoe {
namespace {

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  if (!zero_the_rest<T>(in))
    return;
  std::vector<int64_t> busy;
  for (int64_t e = 0; e < in.experts; ++e)
    if (in.count(e) > 0)
      busy.push_back(e);
  const HalfPlan plan(gemm, in.dims, in.order.half_first);
  const Buffer<T> central = pack_central<T>(gemm, in.dims, in.central, plan);
  parallel_for(std::ssize(busy), 1, [&](int64_t begin, int64_t end) {
    const auto run_experts = [&](auto worker) {
      for (int64_t k = begin; k < end; ++k)
        worker.run(busy[k]);
    };
    if (plan.half_first)
      run_experts(HalfFirst<T>(gemm, in, plan, central.get()));
    else
      run_experts(RightFirst<T>(gemm, in, plan, central.get(), in.most_slots()));
  });
}

}  // namespace

void half_left_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) { forward<T>(gemm, in); });
}

}  // namespace mpoe
