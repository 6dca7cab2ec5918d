#include "truth.h"

#include <cmath>

namespace mpoe::truth {
namespace {

constexpr double kSqrt2 = 1.4142135623730951, kPi = 3.141592653589793;

// The places of an element of left, central and right each, and of the element of the weight [I, F]
// that their product is a part of.
struct Places {
  std::int64_t left, central, right, weight;
};

// Visits every product that the weight consists of.
template <class F>
void for_each_product(const BlockDims& d, const F& visit) {
  for (std::int64_t iL = 0; iL < d.iL; ++iL)
    for (std::int64_t jL = 0; jL < d.jL; ++jL)
      for (std::int64_t iC = 0; iC < d.iC; ++iC)
        for (std::int64_t jC = 0; jC < d.jC; ++jC)
          for (std::int64_t iR = 0; iR < d.iR; ++iR)
            for (std::int64_t jR = 0; jR < d.jR; ++jR) {
              const std::int64_t i = (iL * d.iC + iC) * d.iR + iR;
              const std::int64_t j = (jL * d.jC + jC) * d.jR + jR;
              if (i >= d.in_features || j >= d.out_features)
                continue;
              for (std::int64_t a = 0; a < d.a; ++a)
                for (std::int64_t b = 0; b < d.b; ++b)
                  visit({(iL * d.jL + jL) * d.a + a,
                         ((a * d.iC + iC) * d.jC + jC) * d.b + b,
                         (b * d.iR + iR) * d.jR + jR,
                         i * d.out_features + j});
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
  const std::int64_t I = d.in_features, F = d.out_features;
  const std::int64_t left_size = d.iL * d.jL * d.a, right_size = d.b * d.iR * d.jR;
  Result r;
  r.y.assign(p.slots * F, 0);
  r.z.assign(p.slots * F, 0);
  r.dx.assign(p.x.size(), 0);
  r.dleft.assign(p.left.size(), 0);
  r.dcentral.assign(p.central.size(), 0);
  r.dright.assign(p.right.size(), 0);
  r.dbias.assign(F, 0);
  for (std::int64_t e = 0; e < p.experts; ++e) {
    const double* left = p.left.data() + e * left_size;
    const double* right = p.right.data() + e * right_size;
    Values weight(I * F), dweight(I * F);
    for_each_product(d, [&](const Places& at) {
      weight[at.weight] += left[at.left] * p.central[at.central] * right[at.right];
    });
    for (std::int64_t s = p.offsets[e]; s < p.offsets[e + 1]; ++s) {
      const std::int64_t row = p.row_index.empty() ? s : p.row_index[s];
      const double* x = p.x.data() + row * I;
      double* dx = r.dx.data() + row * I;
      for (std::int64_t f = 0; f < F; ++f) {
        double z = p.bias.empty() ? 0 : p.bias[f];
        for (std::int64_t i = 0; i < I; ++i)
          z += x[i] * weight[i * F + f];
        double& grad = p.grad[s * F + f];
        if (p.activation == Activation::kRelu && std::abs(z) < relu_margin)
          grad = 0;
        r.z[s * F + f] = z;
        r.y[s * F + f] = activate(p.activation, z);
        const double dz = grad * derivative(p.activation, z);
        r.dbias[f] += dz;
        for (std::int64_t i = 0; i < I; ++i) {
          dx[i] += dz * weight[i * F + f];
          dweight[i * F + f] += x[i] * dz;
        }
      }
    }
    double* dleft = r.dleft.data() + e * left_size;
    double* dright = r.dright.data() + e * right_size;
    for_each_product(d, [&](const Places& at) {
      dleft[at.left] += dweight[at.weight] * p.central[at.central] * right[at.right];
      r.dcentral[at.central] += left[at.left] * dweight[at.weight] * right[at.right];
      dright[at.right] += left[at.left] * p.central[at.central] * dweight[at.weight];
    });
  }
  return r;
}

}  // namespace mpoe::truth
