// mpoe_routed_ffn: a mixture's functions one after another.
#include "refusal.h"

namespace {

using namespace mpoe;

template <class T>
void multiply(T* rows, const T* factors, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) store(rows[i], load(factors[i]) * load(rows[i]));
}

// Rows of the gate's projection times those of the other, in place of the latter.
int multiply_rows(const MpoeLinear& up, const MpoeLinear& gate) {
  return answered([&] {
    require(up.slots == gate.slots && up.out_features == gate.out_features, "both projections must have the same rows");
    const std::int64_t count = up.slots * up.out_features;
    if (dtype_named(up.dtype) == Dtype::kFloat32)
      multiply(static_cast<float*>(up.y), static_cast<const float*>(gate.y), count);
    else
      multiply(static_cast<BFloat16*>(up.y), static_cast<const BFloat16*>(gate.y), count);
  });
}

}  // namespace

extern "C" int mpoe_routed_ffn(
    const MpoeRouter* router, const MpoeRoute* slots, const MpoeLinear* up, const MpoeLinear* gate,
    const MpoeLinear* down, const MpoeCombine* combined) {
  int status = mpoe_gating(router);
  if (status == kDone) status = mpoe_route(slots);
  if (status == kDone) status = mpoe_linear_forward(up);
  if (status == kDone && gate != nullptr) status = mpoe_linear_forward(gate);
  if (status == kDone && gate != nullptr) status = multiply_rows(*up, *gate);
  if (status == kDone) status = mpoe_linear_forward(down);
  return status == kDone ? mpoe_combine(combined) : status;
}
