// The grouped MPO linear layer, by plain loops in double precision.
#pragma once

#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/linear/linear.h"

namespace mpoe::truth {

using Values = std::vector<double>;

struct Problem {
  BlockDims dims;
  ProductOrder order;  // which the results do not depend on but for rounding
  Values x, left, central, right, bias, grad;    // bias may be empty
  std::vector<std::int64_t> offsets, row_index;  // row_index may be empty
  std::int64_t tokens, slots, experts;
  Activation activation;
};

struct Result {
  Values y, z;                                // [N, F]: output and pre-activation
  Values dx, dleft, dcentral, dright, dbias;  // of sum(y * grad)
};

// The arrays of a problem.
struct Operands {
  check::Array x, left, central, right, bias, grad;
};
// Random ones for a problem that has its sizes: their values, and rows if they are gathered.
Operands random_operands(Problem& problem,
                         Dtype dtype,
                         bool gathered,
                         bool has_bias,
                         std::int64_t shift,
                         check::Random& random);

double activate(Activation activation, double z);
double derivative(Activation activation, double z);
// Everything. For relu, gradients are taken as if `grad` were zero where |z| < relu_margin (it is
// zeroed in `problem`).
Result solve(Problem& problem, double relu_margin);

}  // namespace mpoe::truth
