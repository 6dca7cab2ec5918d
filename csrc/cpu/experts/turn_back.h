// The activation's gradient that both forms of experts share. Part of the bodies of each instruction
// set; nothing here may use inline functions that other files share.
#pragma once

#include "cpu/gemm/math.h"

namespace mpoe {
namespace {

struct TurnedBack {
  Floats h;           // act(z), times value if gated
  Floats dvalue, dz;  // gradients of value (if gated) and z
};

// dh: gradient of h before the gate's factor; value: null if not gated.
template <Activation kind>
TurnedBack turn_back(Floats z, Floats dh, Floats gate, const Floats* value) {
  const Floats act = activate<kind>(z);
  const Floats down = gate * dh;
  if (value == nullptr)
    return {act, Floats{}, deactivate<kind>(down, z)};
  return {act * *value, down * act, deactivate<kind>(down * *value, z)};
}

}  // namespace
}  // namespace mpoe
