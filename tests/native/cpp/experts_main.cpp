// Hidden-side experts, and experts of their own neurons, under sanitizers: results and all
// gradients are written whole and have the same bits with 1 and 3 threads. What the values are is
// tested from Python (tests/kernels/test_experts.py).
#include <algorithm>

#include "check.h"
#include "cpu/experts/experts.h"

namespace mpoe {
namespace {

using check::Array;

struct HiddenCase {
  std::int64_t tokens, top_k, experts, block, groups;
  bool own, gated, bias;  // own: every group has its own blocks
};

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

// Numbers of elements; 0: there is no such operand.
struct Sizes {
  std::int64_t x, right, left, bias, x_gate, right_gate, out;
};

void* place(const Array& array) {
  return array.count() > 0 ? array.data() : nullptr;
}

template <class Kind>
void check_experts(Kind experts, const Sizes& sizes, const std::string& what) {
  check::Random random(1);
  const Dtype dtype = experts.dtype;
  const auto input = [&](std::int64_t count) {
    return Array::random(dtype, count, random);
  };
  const std::int64_t pairs = experts.tokens * experts.top_k;
  const Array x = input(sizes.x), right = input(sizes.right), left = input(sizes.left),
              bias = input(sizes.bias), x_gate = input(sizes.x_gate),
              right_gate = input(sizes.right_gate), grad = input(sizes.out);
  const Array gates = Array::random(Dtype::kFloat32, pairs, random);
  std::vector<std::int64_t> index(pairs);
  for (std::int64_t& e : index)  // some are -1 if there is more than one expert
    e = random.below(experts.experts + 1) - 1;
  if (experts.experts == 1)
    std::fill(index.begin(), index.end(), 0);
  experts.activation = sizes.right_gate > 0 ? Activation::kSilu : Activation::kRelu;
  experts.x = x.data();
  experts.gates = static_cast<const float*>(gates.data());
  experts.index = index.data();
  experts.right = right.data();
  experts.left = left.data();
  experts.bias = place(bias);
  experts.x_gate = place(x_gate);
  experts.right_gate = place(right_gate);
  const std::vector<check::Output> outputs{{"out", dtype, sizes.out},
                                           {"dx", dtype, sizes.x},
                                           {"dgates", Dtype::kFloat32, pairs},
                                           {"dright", dtype, sizes.right},
                                           {"dleft", dtype, sizes.left},
                                           {"dbias", dtype, sizes.bias},
                                           {"dx_gate", dtype, sizes.x_gate},
                                           {"dright_gate", dtype, sizes.right_gate}};
  const std::string name = what + ", " + check::name_of(dtype);
  check::compare(name, outputs, [&](std::vector<Array>& results) {
    experts_forward(experts, results[0].data());
    if constexpr (std::is_same_v<Kind, HiddenExperts>) {
      Array in_place(dtype, sizes.x);
      for (std::int64_t i = 0; i < sizes.x; ++i)
        in_place.set(i, x.get(i));
      HiddenExperts overwriting = experts;
      overwriting.x = in_place.data();
      experts_forward(overwriting, in_place.data());
      check::require(in_place.same_bits(results[0]), name + ": other bits in place");
    }
    experts_backward(experts,
                     grad.data(),
                     {.dx = place(results[1]),
                      .dgates = static_cast<float*>(place(results[2])),
                      .dright = place(results[3]),
                      .dleft = place(results[4]),
                      .dbias = place(results[5]),
                      .dx_gate = place(results[6]),
                      .dright_gate = place(results[7])});
  });
}

void check_hidden(const HiddenCase& c, Dtype dtype, int number) {
  HiddenExperts experts{};
  experts.dtype = dtype;
  experts.tokens = c.tokens;
  experts.experts = c.experts;
  experts.top_k = c.top_k;
  experts.features = c.block * c.groups;
  experts.block = c.block;
  experts.own_groups = c.own ? c.groups : 1;
  const std::int64_t rows = c.tokens * experts.features;
  const std::int64_t blocks = c.experts * experts.own_groups * c.block * c.block;
  const Sizes sizes{.x = rows,
                    .right = blocks,
                    .left = blocks,
                    .bias = c.bias ? c.experts * experts.features : 0,
                    .x_gate = c.gated ? rows : 0,
                    .right_gate = c.gated ? blocks : 0,
                    .out = rows};
  check_experts(experts, sizes, "hidden, case " + std::to_string(number));
}

void check_neurons(const NeuronCase& c, Dtype dtype, int number) {
  NeuronExperts experts{};
  experts.dtype = dtype;
  experts.tokens = c.tokens;
  experts.experts = c.experts;
  experts.top_k = c.top_k;
  experts.in_features = c.width;
  experts.out_features = c.out;
  experts.neurons = c.neurons;
  const std::int64_t rows = c.experts * c.neurons;
  const Sizes sizes{.x = c.tokens * c.width,
                    .right = rows * c.width,
                    .left = rows * c.out,
                    .bias = c.bias ? rows : 0,
                    .x_gate = 0,
                    .right_gate = c.gated ? rows * c.width : 0,
                    .out = c.tokens * c.out};
  check_experts(experts, sizes, "neurons, case " + std::to_string(number));
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
