// Bodies of kernels.h. Included by one file per instruction set, which defines MPOE_EXPERTS, the
// name of its table. Nothing here may use inline functions that other files share.
#include "cpu/experts/hidden_body.h"
#include "cpu/experts/neurons_body.h"

namespace mpoe {
namespace {

template <class T>
constexpr ExpertKernels kernels_of() {
  return {forward<T>, backward<T>, activate_as<T>, turn_back_as<T>, add_tile, add_products<T>};
}

}  // namespace

extern const ExpertKernels MPOE_EXPERTS[2];
const ExpertKernels MPOE_EXPERTS[2] = {kernels_of<float>(), kernels_of<BFloat16>()};

}  // namespace mpoe
