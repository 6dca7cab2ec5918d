// How a grouped MPO linear is given to the bindings.
#pragma once

#include "bindings/bindings.h"
#include "cpu/linear/linear.h"

namespace mpoe {

struct LinearStrategy {
  std::string_view name;
  void (*forward)(const LinearForward&);
  void (*backward)(const LinearBackward&);
};

// Everything of a call except its rows and its memory, checked once.
struct LinearSizes {
  Dtype dtype;
  Activation activation;
  const LinearStrategy* strategy;
  int64_t experts;
  BlockDims dims;
  ProductOrder order;

  bool is_separable() const { return strategy->name == "separable"; }
  // blocks: left, central, right. The caller has checked `row_index`; `offsets` must outlive the
  // result.
  LinearInputs inputs(const void* x,
                      int64_t tokens,
                      const Addresses<3>& blocks,
                      const std::vector<int64_t>& offsets,
                      const int64_t* row_index,
                      int64_t slots) const;
};

}  // namespace mpoe
