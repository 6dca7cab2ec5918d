#include "truth.h"

#include <cmath>

namespace mpoe::truth {
namespace {

constexpr double kSqrt2 = 1.4142135623730951, kPi = 3.141592653589793;

// c[m, n] += a[m, k] b[k, n], with strides.
void multiply(std::int64_t m,
              std::int64_t n,
              std::int64_t k,
              const double* a,
              std::int64_t am,
              std::int64_t ak,
              const double* b,
              std::int64_t bk,
              std::int64_t bn,
              double* c,
              std::int64_t cm,
              std::int64_t cn) {
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t l = 0; l < k; ++l)
      for (std::int64_t j = 0; j < n; ++j)
        c[i * cm + j * cn] += a[i * am + l * ak] * b[l * bk + j * bn];
}

// Weights in block order [(iL jL), (iC jC), (iR jR)]: the place of each in the padded matrix [I,
// F].
template <class F>
void each_weight(const BlockDims& d, const F& visit) {
  std::int64_t place = 0;
  for (std::int64_t iL = 0; iL < d.iL; ++iL)
    for (std::int64_t jL = 0; jL < d.jL; ++jL)
      for (std::int64_t iC = 0; iC < d.iC; ++iC)
        for (std::int64_t jC = 0; jC < d.jC; ++jC)
          for (std::int64_t iR = 0; iR < d.iR; ++iR)
            for (std::int64_t jR = 0; jR < d.jR; ++jR, ++place) {
              const std::int64_t i = (iL * d.iC + iC) * d.iR + iR, j = (jL * d.jC + jC) * d.jR + jR;
              if (i < d.in_features && j < d.out_features)
                visit(place, i * d.out_features + j);
            }
}

}  // namespace

Operands random_operands(Problem& p,
                         Dtype dtype,
                         bool gathered,
                         bool has_bias,
                         std::int64_t shift,
                         check::Random& random) {
  const BlockDims& d = p.dims;
  for (std::int64_t s = 0; gathered && s < p.slots; ++s)
    p.row_index.push_back(random.below(p.tokens));
  // Sums of as many products have about the size of one.
  const auto array = [&](Values& values, std::int64_t count, std::int64_t sum) {
    const double scale = std::sqrt(3.0 / static_cast<double>(sum));
    check::Array made = check::Array::random(dtype, count, random, scale, shift);
    values = made.values();
    return made;
  };
  Operands made;
  made.x = array(p.x, p.tokens * d.in_features, 3);
  made.left = array(p.left, p.experts * d.iL * d.jL * d.a, d.iL);
  made.central = array(p.central, d.a * d.iC * d.jC * d.b, d.a * d.iC);
  made.right = array(p.right, p.experts * d.b * d.iR * d.jR, d.b * d.iR);
  made.bias = array(p.bias, has_bias ? d.out_features : 0, 3);
  made.grad = array(p.grad, p.slots * d.out_features, 3);
  return made;
}

double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::kRelu: return z > 0 ? z : 0;
    case Activation::kGelu: return z * 0.5 * (1 + std::erf(z / kSqrt2));
    case Activation::kGeluTanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / kPi) * (z + 0.044715 * z * z * z)));
    case Activation::kSilu: return z / (1 + std::exp(-z));
    default: return z;
  }
}

double derivative(Activation activation, double z) {
  if (activation == Activation::kRelu)
    return z > 0;
  constexpr double kStep = 1e-5;
  return (activate(activation, z + kStep) - activate(activation, z - kStep)) / (2 * kStep);
}

Result solve(Problem& p, double relu_margin) {
  const BlockDims& d = p.dims;
  const std::int64_t I = d.in_features, F = d.out_features, filled = p.offsets.back();
  const std::int64_t rows = d.iL * d.jL, middle = d.iC * d.jC, columns = d.iR * d.jR;
  Result r;
  r.y.assign(p.slots * F, 0);
  r.z.assign(p.slots * F, 0);
  r.dx.assign(p.x.size(), 0);
  r.dleft.assign(p.left.size(), 0);
  r.dcentral.assign(p.central.size(), 0);
  r.dright.assign(p.right.size(), 0);
  r.dbias.assign(F, 0);
  for (std::int64_t e = 0; e < p.experts; ++e) {
    const double* left = p.left.data() + e * rows * d.a;
    const double* right = p.right.data() + e * d.b * columns;
    Values half(rows * middle * d.b), blocks(rows * middle * columns), weight(I * F),
        dweight(I * F);
    multiply(rows,
             middle * d.b,
             d.a,
             left,
             d.a,
             1,
             p.central.data(),
             middle * d.b,
             1,
             half.data(),
             middle * d.b,
             1);
    multiply(rows * middle,
             columns,
             d.b,
             half.data(),
             d.b,
             1,
             right,
             columns,
             1,
             blocks.data(),
             columns,
             1);
    each_weight(d, [&](std::int64_t place, std::int64_t at) { weight[at] = blocks[place]; });
    for (std::int64_t s = p.offsets[e]; s < p.offsets[e + 1]; ++s) {
      const std::int64_t row = p.row_index.empty() ? s : p.row_index[s];
      double* z = r.z.data() + s * F;
      for (std::int64_t f = 0; f < F; ++f)
        z[f] = p.bias.empty() ? 0 : p.bias[f];
      multiply(1, F, I, p.x.data() + row * I, I, 1, weight.data(), F, 1, z, F, 1);
      Values dz(F);
      for (std::int64_t f = 0; f < F; ++f) {
        r.y[s * F + f] = activate(p.activation, z[f]);
        if (p.activation == Activation::kRelu && std::abs(z[f]) < relu_margin)
          p.grad[s * F + f] = 0;
        dz[f] = p.grad[s * F + f] * derivative(p.activation, z[f]);
        r.dbias[f] += dz[f];
      }
      multiply(1, I, F, dz.data(), F, 1, weight.data(), 1, F, r.dx.data() + row * I, I, 1);
      multiply(I, F, 1, p.x.data() + row * I, 1, 1, dz.data(), F, 1, dweight.data(), F, 1);
    }
    if (filled == 0)
      continue;
    Values dblocks(blocks.size()), dhalf(half.size());
    each_weight(d, [&](std::int64_t place, std::int64_t at) { dblocks[place] = dweight[at]; });
    double* dleft = r.dleft.data() + e * rows * d.a;
    double* dright = r.dright.data() + e * d.b * columns;
    multiply(d.b,
             columns,
             rows * middle,
             half.data(),
             1,
             d.b,
             dblocks.data(),
             columns,
             1,
             dright,
             columns,
             1);
    multiply(rows * middle,
             d.b,
             columns,
             dblocks.data(),
             columns,
             1,
             right,
             1,
             columns,
             dhalf.data(),
             d.b,
             1);
    multiply(d.a,
             middle * d.b,
             rows,
             left,
             1,
             d.a,
             dhalf.data(),
             middle * d.b,
             1,
             r.dcentral.data(),
             middle * d.b,
             1);
    multiply(rows,
             d.a,
             middle * d.b,
             dhalf.data(),
             middle * d.b,
             1,
             p.central.data(),
             1,
             middle * d.b,
             dleft,
             d.a,
             1);
  }
  return r;
}

}  // namespace mpoe::truth
