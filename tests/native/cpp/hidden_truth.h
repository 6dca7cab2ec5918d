// Experts on the hidden side as loops in double precision, for the programs that run kernels under
// sanitizers.
#pragma once

#include <algorithm>

#include "check.h"

namespace mpoe::check {

using HiddenIndex = std::vector<std::int64_t>;
using HiddenValues = std::vector<double>;

// Inputs are random; `own`: every group has its own blocks.
struct HiddenCase {
  std::int64_t tokens, top_k, experts, block, groups;
  bool own, gated, bias;
};

inline double sigmoid(double z) {
  return 1 / (1 + std::exp(-z));
}

// relu without a gate, silu with one.
inline double activated(const HiddenCase& c, double z) {
  return c.gated ? z * sigmoid(z) : std::max(z, 0.0);
}
inline double slope(const HiddenCase& c, double z) {
  return c.gated ? sigmoid(z) * (1 + z * (1 - sigmoid(z))) : static_cast<double>(z > 0);
}

struct HiddenArrays {
  Array u, u_gate, gates, right, left, right_gate, bias, grad;
  HiddenIndex index;
};

// The result, then du, dgates, dright, dleft, dbias, du_gate, dright_gate.
inline std::vector<HiddenValues> hidden_truth(const HiddenCase& c, const HiddenArrays& in) {
  const std::int64_t b = c.block, features = b * c.groups,
                     cores = c.experts * (c.own ? c.groups : 1) * b * b;
  HiddenValues out(c.tokens * features), du(out.size()), dug(out.size()),
      dgates(c.tokens * c.top_k);
  HiddenValues dr(cores), dl(cores);
  HiddenValues drg(cores), dbias(c.experts * features), v(b), z(b), dh(b);
  for (std::int64_t s = 0; s < c.tokens * c.top_k; ++s) {
    const std::int64_t e = in.index[s];
    if (e < 0)
      continue;
    for (std::int64_t g = 0; g < c.groups; ++g) {
      const std::int64_t row = s / c.top_k * features + g * b,
                         core = (c.own ? e * c.groups + g : e) * b * b;
      for (std::int64_t j = 0; j < b; ++j) {
        double plain = 0, gate = 0;
        for (std::int64_t i = 0; i < b; ++i) {
          plain += in.u.get(row + i) * in.right.get(core + i * b + j);
          if (c.gated)
            gate += in.u_gate.get(row + i) * in.right_gate.get(core + i * b + j);
        }
        const double shift = c.bias ? in.bias.get(e * features + g * b + j) : 0;
        v[j] = c.gated ? plain : 1;
        z[j] = (c.gated ? gate : plain) + shift;
        dh[j] = 0;
        for (std::int64_t o = 0; o < b; ++o)
          dh[j] += in.grad.get(row + o) * in.left.get(core + j * b + o);
      }
      for (std::int64_t j = 0; j < b; ++j) {
        const double gate = in.gates.get(s), h = activated(c, z[j]) * v[j];
        const double dz = gate * dh[j] * v[j] * slope(c, z[j]),
                     dv = gate * dh[j] * activated(c, z[j]);
        dgates[s] += h * dh[j];
        dbias[e * features + g * b + j] += dz;
        for (std::int64_t i = 0; i < b; ++i) {
          out[row + i] += gate * h * in.left.get(core + j * b + i);
          dl[core + j * b + i] += gate * h * in.grad.get(row + i);
          dr[core + i * b + j] += in.u.get(row + i) * (c.gated ? dv : dz);
          du[row + i] += (c.gated ? dv : dz) * in.right.get(core + i * b + j);
          if (!c.gated)
            continue;
          drg[core + i * b + j] += in.u_gate.get(row + i) * dz;
          dug[row + i] += dz * in.right_gate.get(core + i * b + j);
        }
      }
    }
  }
  return {out, du, dgates, dr, dl, dbias, dug, drg};
}

// Random inputs; some choices are -1 if there is more than one expert.
inline HiddenArrays hidden_inputs(const HiddenCase& c, Dtype dtype, Random& random) {
  const std::int64_t features = c.block * c.groups, rows = c.tokens * features,
                     pairs = c.tokens * c.top_k;
  const std::int64_t cores = c.experts * (c.own ? c.groups : 1) * c.block * c.block;
  const double scale = 1 / std::sqrt(static_cast<double>(c.block));
  const auto filled = [&](std::int64_t count, double size) {
    return Array::random(dtype, count, random, size);
  };
  HiddenArrays in{filled(rows, 1),
                  filled(rows, 1),
                  Array::random(Dtype::kFloat32, pairs, random),
                  filled(cores, scale),
                  filled(cores, scale),
                  filled(cores, scale),
                  filled(c.experts * features, 1),
                  filled(rows, 1),
                  HiddenIndex(pairs)};
  for (std::int64_t& e : in.index)
    e = random.below(c.experts + 1) - (c.experts > 1 ? 1 : 0);
  for (std::int64_t& e : in.index)
    e = std::min(e, c.experts - 1);
  return in;
}

}  // namespace mpoe::check
