// Experts on the hidden side in bfloat16, forward and backward. See sweep.h.
#include "emulator/sweep.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/activation.cuh"
#include "cuda/linear/contract.h"
#include "cuda/hidden_experts/hidden_experts.h"
#include "cuda/hidden_experts/launch.h"
#include "native/cpp/hidden_truth.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace mpoe::cuda {

void check_launch(const char*) {}  // contract.cu's; nothing else of it is needed

// Other dtypes take long to compile with sanitizers and have the same tiles, barriers and sums.
[[noreturn]] void bfloat16_only() { throw std::logic_error("bfloat16 only"); }
void hidden_float(const HiddenArguments&, const HiddenSums&, cudaStream_t) { bfloat16_only(); }
void hidden_tf32(const HiddenArguments&, const HiddenSums&, cudaStream_t) { bfloat16_only(); }
void hidden_float16(const HiddenArguments&, const HiddenSums&, cudaStream_t) { bfloat16_only(); }

namespace {

using check::Array;

constexpr Dtype kDtype = Dtype::kBFloat16;
const check::HiddenCase kCases[] = {
    {0, 1, 2, 8, 2, true, false, true},   {1, 2, 3, 5, 3, true, true, true},    {23, 2, 3, 16, 2, false, true, true},
    {40, 1, 1, 24, 3, true, false, false}, {100, 3, 5, 64, 1, false, false, true}, {9, 4, 40, 33, 2, true, true, false},
};

void run(const check::HiddenCase& c, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const check::HiddenArrays in = check::hidden_inputs(c, kDtype, random);
  HiddenBackward p;
  p.dtype = kDtype;
  p.tokens = static_cast<int>(c.tokens);
  p.features = static_cast<int>(c.block * c.groups);
  p.block = static_cast<int>(c.block);
  p.own = static_cast<int>(c.own ? c.groups : 1);
  p.experts = static_cast<int>(c.experts);
  p.top_k = static_cast<int>(c.top_k);
  p.activation = c.gated ? kSilu : kRelu;
  p.u = in.u.data();
  p.u_gate = c.gated ? in.u_gate.data() : nullptr;
  p.gates = static_cast<const float*>(in.gates.data());
  p.index = in.index.data();
  p.right = in.right.data();
  p.right_gate = c.gated ? in.right_gate.data() : nullptr;
  p.left = in.left.data();
  p.bias = c.bias ? in.bias.data() : nullptr;
  const auto truth = check::hidden_truth(c, in);
  std::vector<Array> found;
  for (std::size_t k = 0; k < truth.size(); ++k) {
    found.emplace_back(k == 2 ? Dtype::kFloat32 : kDtype, static_cast<int64_t>(truth[k].size()));
  }
  HiddenForward forward{p};
  forward.out = found[0].data();
  hidden_forward(forward, nullptr);
  p.grad = in.grad.data();
  p.du = found[1].data();
  p.dgates = static_cast<float*>(found[2].data());
  p.dright = found[3].data();
  p.dleft = found[4].data();
  p.dbias = c.bias ? found[5].data() : nullptr;
  p.du_gate = c.gated ? found[6].data() : nullptr;
  p.dright_gate = c.gated ? found[7].data() : nullptr;
  const Array scratch(Dtype::kFloat32, static_cast<int64_t>(workspace_bytes(p) / 4));
  hidden_backward(p, scratch.data(), nullptr);
  const char* const names[] = {"out", "du", "dgates", "dright", "dleft", "dbias", "du_gate", "dright_gate"};
  for (std::size_t k = 0; k < found.size(); ++k) {
    if ((k == 5 && !c.bias) || (k > 5 && !c.gated)) continue;
    const std::string what = "case " + std::to_string(number) + ": " + names[k];
    check::require_close(found[k], truth[k], check::tolerance(kDtype), what);
  }
}

}  // namespace
}  // namespace mpoe::cuda

int main(int count, char** words) {
  return emu::sweep(count, words, [] {
    int number = 0;
    for (const auto& c : mpoe::cuda::kCases) mpoe::cuda::run(c, number++);
  });
}
