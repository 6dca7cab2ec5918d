// Hidden-side experts under sanitizers: results and all gradients against loops in double, with 1 and 3 threads.
#include <algorithm>

#include "check.h"
#include "cpu/hidden_experts.h"

namespace mpoe {
namespace {

using check::Array;
using Index = std::vector<std::int64_t>;
using Values = std::vector<double>;

struct Case {
  std::int64_t tokens, top_k, experts, block, groups;
  bool own, gated, bias;
};

const Case kCases[] = {
    {0, 1, 2, 8, 2, true, false, false},   {1, 2, 3, 5, 3, true, true, true},    {7, 1, 9, 1, 4, false, false, true},
    {40, 2, 4, 33, 2, true, false, true},  {130, 2, 3, 64, 2, true, true, false}, {150, 1, 1, 64, 3, false, true, true},
    {65, 4, 5, 48, 3, false, false, true}, {90, 1, 1, 100, 1, true, false, false},
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// relu where there is no gate, silu beside one.
double activated(const Case& c, double z) { return c.gated ? z * sigmoid(z) : std::max(z, 0.0); }
double slope(const Case& c, double z) {
  return c.gated ? sigmoid(z) * (1 + z * (1 - sigmoid(z))) : static_cast<double>(z > 0);
}

struct Inputs {
  Array u, u_gate, gates, right, left, right_gate, bias, grad;
  Index index;
};

// The result, then du, dgates, dright, dleft, dbias, du_gate, dright_gate.
std::vector<Values> truth_of(const Case& c, const Inputs& in) {
  const std::int64_t b = c.block, features = b * c.groups, cores = c.experts * (c.own ? c.groups : 1) * b * b;
  Values out(c.tokens * features), du(out.size()), dug(out.size()), dgates(c.tokens * c.top_k), dr(cores), dl(cores);
  Values drg(cores), dbias(c.experts * features), v(b), z(b), dh(b);
  for (std::int64_t s = 0; s < c.tokens * c.top_k; ++s) {
    const std::int64_t e = in.index[s];
    if (e < 0) continue;
    for (std::int64_t g = 0; g < c.groups; ++g) {
      const std::int64_t row = s / c.top_k * features + g * b, core = (c.own ? e * c.groups + g : e) * b * b;
      for (std::int64_t j = 0; j < b; ++j) {
        double plain = 0, gate = 0;
        for (std::int64_t i = 0; i < b; ++i) {
          plain += in.u.get(row + i) * in.right.get(core + i * b + j);
          if (c.gated) gate += in.u_gate.get(row + i) * in.right_gate.get(core + i * b + j);
        }
        const double shift = c.bias ? in.bias.get(e * features + g * b + j) : 0;
        v[j] = c.gated ? plain : 1;
        z[j] = (c.gated ? gate : plain) + shift;
        dh[j] = 0;
        for (std::int64_t o = 0; o < b; ++o) dh[j] += in.grad.get(row + o) * in.left.get(core + j * b + o);
      }
      for (std::int64_t j = 0; j < b; ++j) {
        const double gate = in.gates.get(s), h = activated(c, z[j]) * v[j];
        const double dz = gate * dh[j] * v[j] * slope(c, z[j]), dv = gate * dh[j] * activated(c, z[j]);
        dgates[s] += h * dh[j];
        dbias[e * features + g * b + j] += dz;
        for (std::int64_t i = 0; i < b; ++i) {
          out[row + i] += gate * h * in.left.get(core + j * b + i);
          dl[core + j * b + i] += gate * h * in.grad.get(row + i);
          dr[core + i * b + j] += in.u.get(row + i) * (c.gated ? dv : dz);
          du[row + i] += (c.gated ? dv : dz) * in.right.get(core + i * b + j);
          if (!c.gated) continue;
          drg[core + i * b + j] += in.u_gate.get(row + i) * dz;
          dug[row + i] += dz * in.right_gate.get(core + i * b + j);
        }
      }
    }
  }
  return {out, du, dgates, dr, dl, dbias, dug, drg};
}

void check_case(const Case& c, Dtype dtype, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const std::int64_t features = c.block * c.groups, rows = c.tokens * features, pairs = c.tokens * c.top_k;
  const std::int64_t cores = c.experts * (c.own ? c.groups : 1) * c.block * c.block;
  const double scale = 1 / std::sqrt(static_cast<double>(c.block));
  const auto filled = [&](std::int64_t count, double size) { return Array::random(dtype, count, random, size); };
  Inputs in{filled(rows, 1), filled(rows, 1), Array::random(Dtype::kFloat32, pairs, random), filled(cores, scale),
            filled(cores, scale), filled(cores, scale), filled(c.experts * features, 1), filled(rows, 1), Index(pairs)};
  for (std::int64_t& e : in.index) e = random.below(c.experts + 1) - (c.experts > 1 ? 1 : 0);
  for (std::int64_t& e : in.index) e = std::min(e, c.experts - 1);
  const HiddenExperts arguments{
      .dtype = dtype, .tokens = c.tokens, .features = features, .block = c.block, .experts = c.experts,
      .own_groups = c.own ? c.groups : 1, .top_k = c.top_k,
      .activation = c.gated ? Activation::kSilu : Activation::kRelu, .u = in.u.data(),
      .u_gate = c.gated ? in.u_gate.data() : nullptr, .gates = static_cast<const float*>(in.gates.data()),
      .index = in.index.data(), .right = in.right.data(), .left = in.left.data(),
      .right_gate = c.gated ? in.right_gate.data() : nullptr, .bias = c.bias ? in.bias.data() : nullptr};
  const std::vector<Values> truth = truth_of(c, in);
  const char* const names[] = {"out", "du", "dgates", "dright", "dleft", "dbias", "du_gate", "dright_gate"};
  std::vector<Array> before;
  for (const int threads : {1, 3}) {
    set_threads(threads);
    std::vector<Array> found;
    for (std::size_t k = 0; k < truth.size(); ++k)
      found.emplace_back(k == 2 ? Dtype::kFloat32 : dtype, static_cast<std::int64_t>(truth[k].size()));
    hidden_experts(arguments, found[0].data());
    hidden_experts_backward(
        arguments, in.grad.data(),
        {.du = found[1].data(), .dgates = static_cast<float*>(found[2].data()), .dright = found[3].data(),
         .dleft = found[4].data(), .dbias = c.bias ? found[5].data() : nullptr,
         .du_gate = c.gated ? found[6].data() : nullptr, .dright_gate = c.gated ? found[7].data() : nullptr});
    for (std::size_t k = 0; k < found.size(); ++k) {
      if ((k == 5 && !c.bias) || (k > 5 && !c.gated)) continue;
      const std::string what = "case " + std::to_string(number) + ", " + check::name_of(dtype) + ", " + names[k];
      if (threads == 1)
        check::require_close(found[k], truth[k], check::tolerance(dtype), what);
      else
        check::require(found[k].same_bits(before[k]), what + ": other bits");
    }
    before = std::move(found);
  }
}

}  // namespace
}  // namespace mpoe

int main() {
  if (!mpoe::check::isa_exists()) return 77;
  int number = 0;
  for (const auto& c : mpoe::kCases) {
    mpoe::check_case(c, mpoe::Dtype::kFloat32, number);
    mpoe::check_case(c, mpoe::Dtype::kBFloat16, number++);
  }
  return mpoe::check::finish("hidden");
}
