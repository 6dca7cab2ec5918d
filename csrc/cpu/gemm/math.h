// Activations and their derivatives on vectors of floats. Accurate to a few float32 roundings.
#pragma once

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/vector.h"

namespace mpoe {
namespace {

inline Floats select(Words mask, Floats yes, Floats no) {
  return (Floats)(((Words)yes & mask) | ((Words)no & ~mask));
}
inline Floats maximum(Floats a, Floats b) {
  return select((Words)(a > b), a, b);
}
inline Floats minimum(Floats a, Floats b) {
  return select((Words)(a < b), a, b);
}

// By Horner's rule, coefficients from the highest power down.
template <class... Coefficients>
inline Floats polynomial(Floats x, float highest, Coefficients... others) {
  Floats value = splat(highest);
  ((value = multiply_add(value, x, splat(others))), ...);
  return value;
}

// e^x: x = n ln 2 + r, a Taylor polynomial of degree 7 in r, |r| <= ln 2 / 2 (error below 1e-8),
// times 2^n.
inline Floats exponential(Floats x) {
  const Floats bounded = minimum(maximum(x, splat(-87.0f)), splat(88.0f));
  constexpr float kRound = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const Floats shifted = bounded * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r =
      multiply_add(n, splat(1.90465421e-9f), multiply_add(n, splat(-0.693147182f), bounded));
  const Floats p =
      polynomial(r, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f);
  const Words exponent = (Words)shifted << 23;  // the integer sits in the low bits of the mantissa
  const Floats result = (Floats)((Words)p + exponent);
  return select((Words)(x != x), x, result);
}

inline Floats sigmoid(Floats x) {
  return 1.0f / (1.0f + exponential(-x));
}

// erf by the rational approximation of degree 13 over 8 that Eigen and XLA use, relative error <
// 4e-7.
inline Floats error_function(Floats x) {
  const Floats c = minimum(maximum(x, splat(-3.74392116f)), splat(3.74392116f));
  const Floats s = c * c;
  const Floats p = polynomial(s,
                              0.00022905065861350646f,
                              0.0034082910107109506f,
                              0.050955695062380861f,
                              0.18520832239976145f,
                              1.128379143519084f);
  const Floats q = polynomial(s,
                              -1.1791602954361697e-7f,
                              0.000023547966471313185f,
                              0.0010179625278914885f,
                              0.014070470171167667f,
                              0.11098505178285362f,
                              0.49746925110067538f,
                              1.0f);
  // Beyond the clamp erf is within 2e-7 of 1. A large pre-activation would multiply any error:
  // return the sign itself.
  const Floats sign = select((Words)(x < 0.0f), splat(-1.0f), splat(1.0f));
  const Floats result = select((Words)(c * sign > 3.7439f), sign, c * p / q);
  return select((Words)(x != x), x, result);
}

constexpr float kGeluTanhScale = 2 * 0.7978845608f;  // tanh(u) = 2 sigmoid(2 u) - 1

template <Activation kind>
inline Floats activate(Floats z) {
  if constexpr (kind == Activation::kRelu)
    return select((Words)(z < 0.0f), Floats{}, z);  // NaN stays
  if constexpr (kind == Activation::kGelu)
    return 0.5f * z * (1.0f + error_function(z * 0.70710678f));
  if constexpr (kind == Activation::kGeluTanh)
    return z * sigmoid(kGeluTanhScale * (z + 0.044715f * z * z * z));
  if constexpr (kind == Activation::kSilu)
    return z * sigmoid(z);
  return z;
}

// grad * activation'(saved)
template <Activation kind>
inline Floats deactivate(Floats grad, Floats saved) {
  if constexpr (kind == Activation::kRelu)
    return select((Words)(saved > 0.0f), grad, Floats{});
  if constexpr (kind == Activation::kGelu) {
    const Floats cdf = 0.5f * (1.0f + error_function(saved * 0.70710678f));
    return grad * (cdf + saved * 0.39894228f * exponential(-0.5f * saved * saved));
  }
  if constexpr (kind == Activation::kGeluTanh) {
    const Floats falling =
        exponential(-kGeluTanhScale * (saved + 0.044715f * saved * saved * saved));
    const Floats s = 1.0f / (1.0f + falling);
    const Floats slope = falling * s * s;  // s (1 - s), exact where s is near 1
    return grad * (s + saved * slope * kGeluTanhScale * (1.0f + 3 * 0.044715f * saved * saved));
  }
  if constexpr (kind == Activation::kSilu) {
    const Floats falling = exponential(-saved);
    const Floats s = 1.0f / (1.0f + falling);
    return grad * (s + saved * (falling * s * s));
  }
  return grad;
}

// Calls f with the activation as a constant, a Kind.
template <Activation kind>
struct Kind {
  static constexpr Activation value = kind;
};
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone: return f(Kind<Activation::kNone>{});
    case Activation::kRelu: return f(Kind<Activation::kRelu>{});
    case Activation::kGelu: return f(Kind<Activation::kGelu>{});
    case Activation::kGeluTanh: return f(Kind<Activation::kGeluTanh>{});
    case Activation::kSilu: return f(Kind<Activation::kSilu>{});
  }
}

}  // namespace
}  // namespace mpoe
