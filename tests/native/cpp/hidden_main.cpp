// Hidden-side experts under sanitizers: results and all gradients against loops in double precision, with 1 and 3
// threads.
#include "cpu/hidden_experts/hidden_experts.h"
#include "hidden_truth.h"

namespace mpoe {
namespace {

using check::Array;
using Case = check::HiddenCase;

const Case kCases[] = {
    {0, 1, 2, 8, 2, true, false, false},   {1, 2, 3, 5, 3, true, true, true},    {7, 1, 9, 1, 4, false, false, true},
    {40, 2, 4, 33, 2, true, false, true},  {130, 2, 3, 64, 2, true, true, false}, {150, 1, 1, 64, 3, false, true, true},
    {65, 4, 5, 48, 3, false, false, true}, {90, 1, 1, 100, 1, true, false, false},
    // Few rows of each expert: whole vectors of columns, single ones and the rest.
    {2, 2, 4, 84, 1, true, true, false},   {3, 1, 5, 40, 2, false, false, true},
};

void check_case(const Case& c, Dtype dtype, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const check::HiddenArrays in = check::hidden_inputs(c, dtype, random);
  const HiddenExperts arguments{
      .dtype = dtype, .tokens = c.tokens, .features = c.block * c.groups, .block = c.block, .experts = c.experts,
      .own_groups = c.own ? c.groups : 1, .top_k = c.top_k,
      .activation = c.gated ? Activation::kSilu : Activation::kRelu, .u = in.u.data(),
      .u_gate = c.gated ? in.u_gate.data() : nullptr, .gates = static_cast<const float*>(in.gates.data()),
      .index = in.index.data(), .right = in.right.data(), .left = in.left.data(),
      .right_gate = c.gated ? in.right_gate.data() : nullptr, .bias = c.bias ? in.bias.data() : nullptr};
  const std::vector<check::HiddenValues> truth = check::hidden_truth(c, in);
  const char* const names[] = {"out", "du", "dgates", "dright", "dleft", "dbias", "du_gate", "dright_gate"};
  std::vector<Array> before;
  for (const int threads : {1, 3}) {
    set_threads(threads);
    std::vector<Array> found;
    for (std::size_t k = 0; k < truth.size(); ++k)
      found.emplace_back(k == 2 ? Dtype::kFloat32 : dtype, static_cast<std::int64_t>(truth[k].size()));
    hidden_experts(arguments, found[0].data());
    Array in_place(dtype, in.u.count());
    if (in.u.count() > 0) std::memcpy(in_place.data(), in.u.data(), in.u.count() * size_of(dtype));
    HiddenExperts overwriting = arguments;
    overwriting.u = in_place.data();
    hidden_experts(overwriting, in_place.data());
    check::require(in_place.same_bits(found[0]), "case " + std::to_string(number) + ": other bits in place");
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
