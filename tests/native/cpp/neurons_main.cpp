// Experts of their own neurons under sanitizers: results and all gradients against loops in double precision, with 1
// and 3 threads.
#include "cpu/neurons/neurons.h"

#include <algorithm>

#include "check.h"

namespace mpoe {
namespace {

using check::Array;
using Values = std::vector<double>;

struct Case {
  std::int64_t tokens, top_k, experts, neurons, width, out;
  bool gated, bias;
};

const Case kCases[] = {
    {0, 1, 2, 8, 5, 4, true, true},      {1, 2, 3, 5, 33, 7, true, true},   {7, 1, 9, 1, 8, 1, false, false},
    {40, 2, 4, 33, 65, 40, false, true}, {60, 16, 3, 64, 17, 31, true, false}, {150, 1, 1, 100, 64, 96, false, true},
    {30, 4, 40, 16, 48, 50, true, true}, {300, 3, 2, 40, 70, 33, true, true},
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

struct Arrays {
  Array x, gates, up, down, bias, gate_up, grad;
  std::vector<std::int64_t> index;
};

// The result, then dx, dgates, dup, ddown, dbias, dgate_up; relu without a gate, silu with one.
std::vector<Values> truth_of(const Case& c, const Arrays& in) {
  Values out(c.tokens * c.out), dx(c.tokens * c.width), dgates(c.tokens * c.top_k);
  Values dup(c.experts * c.neurons * c.width), ddown(c.experts * c.neurons * c.out), dbias(c.experts * c.neurons);
  Values dgate_up(dup.size());
  for (std::int64_t s = 0; s < c.tokens * c.top_k; ++s) {
    if (in.index[s] < 0) continue;
    const std::int64_t x = s / c.top_k * c.width, o = s / c.top_k * c.out;
    const double gate = in.gates.get(s);
    for (std::int64_t j = 0; j < c.neurons; ++j) {
      const std::int64_t neuron = in.index[s] * c.neurons + j;
      double value = 0, z = 0, dh = 0;
      for (std::int64_t i = 0; i < c.width; ++i) {
        value += in.x.get(x + i) * in.up.get(neuron * c.width + i);
        if (c.gated) z += in.x.get(x + i) * in.gate_up.get(neuron * c.width + i);
      }
      if (!c.gated) z = value;
      if (c.bias) z += in.bias.get(neuron);
      for (std::int64_t i = 0; i < c.out; ++i) dh += in.grad.get(o + i) * in.down.get(neuron * c.out + i);
      const double act = c.gated ? z * sigmoid(z) : std::max(z, 0.0);
      const double slope = c.gated ? sigmoid(z) * (1 + z * (1 - sigmoid(z))) : static_cast<double>(z > 0);
      const double h = c.gated ? act * value : act, dz = gate * dh * slope * (c.gated ? value : 1);
      const double dvalue = c.gated ? gate * dh * act : dz;
      dgates[s] += h * dh;
      dbias[neuron] += dz;
      for (std::int64_t i = 0; i < c.out; ++i) {
        out[o + i] += gate * h * in.down.get(neuron * c.out + i);
        ddown[neuron * c.out + i] += gate * h * in.grad.get(o + i);
      }
      for (std::int64_t i = 0; i < c.width; ++i) {
        dx[x + i] += dvalue * in.up.get(neuron * c.width + i);
        dup[neuron * c.width + i] += dvalue * in.x.get(x + i);
        if (!c.gated) continue;
        dx[x + i] += dz * in.gate_up.get(neuron * c.width + i);
        dgate_up[neuron * c.width + i] += dz * in.x.get(x + i);
      }
    }
  }
  return {out, dx, dgates, dup, ddown, dbias, dgate_up};
}

void check_case(const Case& c, Dtype dtype, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const auto filled = [&](std::int64_t count, std::int64_t length) {
    return Array::random(dtype, count, random, 1 / std::sqrt(static_cast<double>(length)));
  };
  const std::int64_t rows = c.experts * c.neurons;
  Arrays in{
      filled(c.tokens * c.width, 1), Array::random(Dtype::kFloat32, c.tokens * c.top_k, random),
      filled(rows * c.width, c.width), filled(rows * c.out, c.neurons), filled(rows, 1),
      filled(rows * c.width, c.width), filled(c.tokens * c.out, 1), std::vector<std::int64_t>(c.tokens * c.top_k)};
  for (std::int64_t& e : in.index) e = std::min(random.below(c.experts + 1) - (c.experts > 1 ? 1 : 0), c.experts - 1);
  const NeuronExperts arguments{
      .dtype = dtype, .tokens = c.tokens, .in_features = c.width, .out_features = c.out, .neurons = c.neurons,
      .experts = c.experts, .top_k = c.top_k, .activation = c.gated ? Activation::kSilu : Activation::kRelu,
      .x = in.x.data(), .gates = static_cast<const float*>(in.gates.data()), .index = in.index.data(),
      .up = in.up.data(), .down = in.down.data(), .bias = c.bias ? in.bias.data() : nullptr,
      .gate_up = c.gated ? in.gate_up.data() : nullptr};
  const std::vector<Values> truth = truth_of(c, in);
  const char* const names[] = {"out", "dx", "dgates", "dup", "ddown", "dbias", "dgate_up"};
  std::vector<Array> before;
  for (const int threads : {1, 3}) {
    set_threads(threads);
    std::vector<Array> found;
    for (std::size_t k = 0; k < truth.size(); ++k)
      found.emplace_back(k == 2 ? Dtype::kFloat32 : dtype, static_cast<std::int64_t>(truth[k].size()));
    neuron_experts(arguments, found[0].data());
    neuron_experts_backward(
        arguments, in.grad.data(),
        {.dx = found[1].data(), .dgates = static_cast<float*>(found[2].data()), .dup = found[3].data(),
         .ddown = found[4].data(), .dbias = c.bias ? found[5].data() : nullptr,
         .dgate_up = c.gated ? found[6].data() : nullptr});
    for (std::size_t k = 0; k < found.size(); ++k) {
      if ((k == 5 && !c.bias) || (k == 6 && !c.gated)) continue;
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
  return mpoe::check::finish("neurons");
}
