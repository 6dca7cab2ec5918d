// Experts on the hidden side in bfloat16, forward and backward; with one group also as neurons. See sweep.h.
#include "emulator/sweep.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/activation.cuh"
#include "cuda/experts/experts.h"
#include "cuda/experts/weights.cuh"
#include "native/cpp/hidden_truth.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace mpoe::cuda {

// Other dtypes take long to compile with sanitizers and have the same tiles, barriers and sums.
[[noreturn]] void bfloat16_only() { throw std::logic_error("bfloat16 only"); }
template <>
void launch<float>(const ExpertsLaunches&, cudaStream_t) {
  bfloat16_only();
}
template <>
void launch<dev::fp16>(const ExpertsLaunches&, cudaStream_t) {
  bfloat16_only();
}

namespace {

using check::Array;

constexpr Dtype kDtype = Dtype::kBFloat16;
const check::HiddenCase kCases[] = {
    {1, 2, 3, 5, 3, true, true, true},     {23, 2, 3, 16, 2, false, true, true},
    {40, 1, 1, 24, 3, true, false, false}, {100, 3, 5, 64, 1, false, false, true}, {9, 4, 40, 33, 2, true, true, false},
    {70, 2, 2, 72, 1, false, true, true},
};

// Exchanges rows and columns of square blocks: as neurons have them.
void transpose(Array& blocks, int64_t size) {
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t row = i / size % size, column = i % size, other = i - row * size - column + column * size + row;
    if (row >= column) continue;
    const double value = blocks.get(i);
    blocks.set(i, blocks.get(other));
    blocks.set(other, value);
  }
}

void run(const check::HiddenCase& c, int number, bool by_unit) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  check::HiddenArrays in = check::hidden_inputs(c, kDtype, random);
  for (int64_t i = 0; by_unit && i < in.u.count(); ++i) in.u_gate.set(i, in.u.get(i));
  auto truth = check::hidden_truth(c, in);
  for (std::size_t i = 0; by_unit && c.gated && i < truth[1].size(); ++i) truth[1][i] += truth[6][i];
  if (by_unit) transpose(in.right, c.block), transpose(in.right_gate, c.block);
  ExpertsBackward p;
  p.dtype = kDtype;
  p.tokens = static_cast<int>(c.tokens);
  p.groups = static_cast<int>(c.groups);
  p.own = static_cast<int>(c.own ? c.groups : 1);
  p.width = p.units = p.columns = static_cast<int>(c.block);
  p.experts = static_cast<int>(c.experts);
  p.top_k = static_cast<int>(c.top_k);
  p.by_unit = by_unit;
  p.activation = c.gated ? kSilu : kRelu;
  p.x = in.u.data();
  p.x_gate = c.gated && !by_unit ? in.u_gate.data() : nullptr;
  p.gates = static_cast<const float*>(in.gates.data());
  p.index = in.index.data();
  p.up = in.right.data();
  p.up_gate = c.gated ? in.right_gate.data() : nullptr;
  p.down = in.left.data();
  p.bias = c.bias ? in.bias.data() : nullptr;
  std::vector<Array> found;
  for (std::size_t k = 0; k < truth.size(); ++k) {
    found.emplace_back(k == 2 ? Dtype::kFloat32 : kDtype, static_cast<int64_t>(truth[k].size()));
  }
  ExpertsForward forward{p};
  forward.out = found[0].data();
  std::vector<Array> taken;
  const Memory memory = [&](std::size_t bytes) {
    taken.emplace_back(Dtype::kFloat32, static_cast<int64_t>(bytes / 4 + 1));
    return taken.back().data();
  };
  experts_forward(forward, memory, nullptr);
  p.grad = in.grad.data();
  p.dx = found[1].data();
  p.dgates = static_cast<float*>(found[2].data());
  p.dup = found[3].data();
  p.ddown = found[4].data();
  p.dbias = c.bias ? found[5].data() : nullptr;
  p.dx_gate = c.gated && !by_unit ? found[6].data() : nullptr;
  p.dup_gate = c.gated ? found[7].data() : nullptr;
  experts_backward(p, memory, nullptr);
  if (by_unit) {
    transpose(found[3], c.block);
    transpose(found[7], c.block);
  }
  const char* const names[] = {"out", "dx", "dgates", "dup", "ddown", "dbias", "dx_gate", "dup_gate"};
  for (std::size_t k = 0; k < found.size(); ++k) {
    if ((k == 5 && !c.bias) || (k == 6 && !p.dx_gate) || (k == 7 && !c.gated)) continue;
    const std::string what = "case " + std::to_string(number) + (by_unit ? ", neurons: " : ": ") + names[k];
    check::require_close(found[k], truth[k], check::tolerance(kDtype), what);
  }
}

}  // namespace
}  // namespace mpoe::cuda

int main(int count, char** words) {
  return emu::sweep(count, words, [] {
    int number = 0;
    for (const auto& c : mpoe::cuda::kCases) {
      mpoe::cuda::run(c, number, false);
      if (c.groups == 1) mpoe::cuda::run(c, number, true);
      ++number;
    }
  });
}
