// Hidden-side experts, and experts of their own neurons, under sanitizers: results and all
// gradients against loops in double precision, with 1 and 3 threads.
#include "cpu/experts/experts.h"
#include "hidden_truth.h"

namespace mpoe {
namespace {

using check::Array;
using check::HiddenCase;
using Values = std::vector<double>;

const HiddenCase kHiddenCases[] = {
    {0, 1, 2, 8, 2, true, false, false},
    {1, 2, 3, 5, 3, true, true, true},
    {7, 1, 9, 1, 4, false, false, true},
    {40, 2, 4, 33, 2, true, false, true},
    {130, 2, 3, 64, 2, true, true, false},
    {150, 1, 1, 64, 3, false, true, true},
    {65, 4, 5, 48, 3, false, false, true},
    {90, 1, 1, 100, 1, true, false, false},
    // Few rows of each expert: whole vectors of columns, single ones and the rest.
    {2, 2, 4, 84, 1, true, true, false},
    {3, 1, 5, 40, 2, false, false, true},
};

// Results of a call by name; the last ones are of a gate, the one before them of a bias.
std::vector<check::Wanted> wanted(Dtype dtype,
                                  const std::vector<const char*>& names,
                                  std::vector<Values> truth,
                                  bool bias,
                                  bool gated) {
  std::vector<check::Wanted> all;
  for (std::size_t k = 0; k < truth.size(); ++k) {
    if ((k == 5 && !bias) || (k > 5 && !gated))
      truth[k].clear();
    const Dtype own = k == 2 ? Dtype::kFloat32 : dtype;  // of gates
    all.push_back({names[k], own, std::move(truth[k]), check::tolerance(dtype)});
  }
  return all;
}

std::string name_of(const char* kind, Dtype dtype, int number) {
  return std::string(kind) + ", case " + std::to_string(number) + ", " + check::name_of(dtype);
}

void check_hidden(const HiddenCase& c, Dtype dtype, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const check::HiddenArrays in = check::hidden_inputs(c, dtype, random);
  HiddenExperts arguments{};
  arguments.dtype = dtype;
  arguments.tokens = c.tokens;
  arguments.features = c.block * c.groups;
  arguments.block = c.block;
  arguments.experts = c.experts;
  arguments.own_groups = c.own ? c.groups : 1;
  arguments.top_k = c.top_k;
  arguments.activation = c.gated ? Activation::kSilu : Activation::kRelu;
  arguments.x = in.u.data();
  arguments.x_gate = c.gated ? in.u_gate.data() : nullptr;
  arguments.gates = static_cast<const float*>(in.gates.data());
  arguments.index = in.index.data();
  arguments.right = in.right.data();
  arguments.left = in.left.data();
  arguments.right_gate = c.gated ? in.right_gate.data() : nullptr;
  arguments.bias = c.bias ? in.bias.data() : nullptr;
  const std::string what = name_of("hidden", dtype, number);
  const std::vector<const char*> names{
      "out", "du", "dgates", "dright", "dleft", "dbias", "du_gate", "dright_gate"};
  check::compare(what,
                 wanted(dtype, names, hidden_truth(c, in), c.bias, c.gated),
                 [&](std::vector<Array>& found) {
                   experts_forward(arguments, found[0].data());
                   Array in_place(dtype, in.u.count());
                   if (in.u.count() > 0)
                     std::memcpy(in_place.data(), in.u.data(), in.u.count() * size_of(dtype));
                   HiddenExperts overwriting = arguments;
                   overwriting.x = in_place.data();
                   experts_forward(overwriting, in_place.data());
                   check::require(in_place.same_bits(found[0]), what + ": other bits in place");
                   experts_backward(arguments,
                                    in.grad.data(),
                                    {.dx = found[1].data(),
                                     .dgates = static_cast<float*>(found[2].data()),
                                     .dright = found[3].data(),
                                     .dleft = found[4].data(),
                                     .dbias = c.bias ? found[5].data() : nullptr,
                                     .dx_gate = c.gated ? found[6].data() : nullptr,
                                     .dright_gate = c.gated ? found[7].data() : nullptr});
                 });
}

struct NeuronCase {
  std::int64_t tokens, top_k, experts, neurons, width, out;
  bool gated, bias;
};

const NeuronCase kNeuronCases[] = {
    {0, 1, 2, 8, 5, 4, true, true},
    {1, 2, 3, 5, 33, 7, true, true},
    {7, 1, 9, 1, 8, 1, false, false},
    {40, 2, 4, 33, 65, 40, false, true},
    {60, 16, 3, 64, 17, 31, true, false},
    {150, 1, 1, 100, 64, 96, false, true},
    {30, 4, 40, 16, 48, 50, true, true},
    {300, 3, 2, 40, 70, 33, true, true},
};

struct NeuronArrays {
  Array x, gates, up, down, bias, gate_up, grad;
  std::vector<std::int64_t> index;
};

// The result, then dx, dgates, dup, ddown, dbias, dgate_up; relu without a gate, silu with one.
std::vector<Values> truth_of(const NeuronCase& c, const NeuronArrays& in) {
  Values out(c.tokens * c.out), dx(c.tokens * c.width), dgates(c.tokens * c.top_k);
  Values dup(c.experts * c.neurons * c.width), ddown(c.experts * c.neurons * c.out),
      dbias(c.experts * c.neurons);
  Values dgate_up(dup.size());
  for (std::int64_t s = 0; s < c.tokens * c.top_k; ++s) {
    if (in.index[s] < 0)
      continue;
    const std::int64_t x = s / c.top_k * c.width, o = s / c.top_k * c.out;
    const double gate = in.gates.get(s);
    for (std::int64_t j = 0; j < c.neurons; ++j) {
      const std::int64_t neuron = in.index[s] * c.neurons + j;
      double value = 0, z = 0, dh = 0;
      for (std::int64_t i = 0; i < c.width; ++i) {
        value += in.x.get(x + i) * in.up.get(neuron * c.width + i);
        if (c.gated)
          z += in.x.get(x + i) * in.gate_up.get(neuron * c.width + i);
      }
      if (!c.gated)
        z = value;
      if (c.bias)
        z += in.bias.get(neuron);
      for (std::int64_t i = 0; i < c.out; ++i)
        dh += in.grad.get(o + i) * in.down.get(neuron * c.out + i);
      const double share = check::sigmoid(z), act = c.gated ? z * share : std::max(z, 0.0);
      const double slope = c.gated ? share * (1 + z * (1 - share)) : static_cast<double>(z > 0);
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
        if (!c.gated)
          continue;
        dx[x + i] += dz * in.gate_up.get(neuron * c.width + i);
        dgate_up[neuron * c.width + i] += dz * in.x.get(x + i);
      }
    }
  }
  return {out, dx, dgates, dup, ddown, dbias, dgate_up};
}

void check_neurons(const NeuronCase& c, Dtype dtype, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const auto filled = [&](std::int64_t count, std::int64_t length) {
    return Array::random(dtype, count, random, 1 / std::sqrt(static_cast<double>(length)));
  };
  const std::int64_t rows = c.experts * c.neurons;
  NeuronArrays in{filled(c.tokens * c.width, 1),
                  Array::random(Dtype::kFloat32, c.tokens * c.top_k, random),
                  filled(rows * c.width, c.width),
                  filled(rows * c.out, c.neurons),
                  filled(rows, 1),
                  filled(rows * c.width, c.width),
                  filled(c.tokens * c.out, 1),
                  std::vector<std::int64_t>(c.tokens * c.top_k)};
  for (std::int64_t& e : in.index)
    e = std::min(random.below(c.experts + 1) - (c.experts > 1 ? 1 : 0), c.experts - 1);
  NeuronExperts arguments{};
  arguments.dtype = dtype;
  arguments.tokens = c.tokens;
  arguments.in_features = c.width;
  arguments.out_features = c.out;
  arguments.neurons = c.neurons;
  arguments.experts = c.experts;
  arguments.top_k = c.top_k;
  arguments.activation = c.gated ? Activation::kSilu : Activation::kRelu;
  arguments.x = in.x.data();
  arguments.gates = static_cast<const float*>(in.gates.data());
  arguments.index = in.index.data();
  arguments.right = in.up.data();
  arguments.left = in.down.data();
  arguments.bias = c.bias ? in.bias.data() : nullptr;
  arguments.right_gate = c.gated ? in.gate_up.data() : nullptr;
  const std::vector<const char*> names{"out", "dx", "dgates", "dup", "ddown", "dbias", "dgate_up"};
  const std::vector<check::Wanted> results = wanted(dtype, names, truth_of(c, in), c.bias, c.gated);
  check::compare(name_of("neurons", dtype, number), results, [&](std::vector<Array>& found) {
    experts_forward(arguments, found[0].data());
    experts_backward(arguments,
                     in.grad.data(),
                     {.dx = found[1].data(),
                      .dgates = static_cast<float*>(found[2].data()),
                      .dright = found[3].data(),
                      .dleft = found[4].data(),
                      .dbias = c.bias ? found[5].data() : nullptr,
                      .dx_gate = nullptr,
                      .dright_gate = c.gated ? found[6].data() : nullptr});
  });
}

}  // namespace
}  // namespace mpoe

int main() {
  using namespace mpoe;
  if (!check::isa_exists())
    return 77;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    int number = 0;
    for (const auto& c : kHiddenCases)
      check_hidden(c, dtype, number++);
    number = 0;
    for (const auto& c : kNeuronCases)
      check_neurons(c, dtype, number++);
  }
  return check::finish("experts");
}
