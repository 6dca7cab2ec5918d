#include "cuda/hidden_experts/hidden_experts.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/hidden_experts/launch.h"
#include "cuda/named.h"
#include "cuda/workspace.h"

namespace mpoe::cuda {
namespace {

HiddenArguments arguments_of(const HiddenInputs& in) {
  if (in.block < 1 || in.block > kLargestHiddenBlock || in.features % in.block != 0) {
    throw std::invalid_argument("blocks of hidden_experts must divide the " + std::to_string(in.features) +
                                " hidden units and have at most " + std::to_string(kLargestHiddenBlock) + "; got " +
                                std::to_string(in.block));
  }
  if (int64_t(in.tokens) * in.top_k >= 1 << 30) {
    throw std::invalid_argument("hidden_experts counts to 2^30 pairs of token and choice");
  }
  HiddenArguments p;
  p.u = in.u;
  p.u_gate = in.u_gate;
  p.right = in.right;
  p.right_gate = in.right_gate;
  p.left = in.left;
  p.bias = in.bias;
  p.gates = in.gates;
  p.index = in.index;
  p.tokens = in.tokens;
  p.features = in.features;
  p.block = in.block;
  p.own = in.own;
  p.experts = in.experts;
  p.top_k = in.top_k;
  p.activation = in.activation;
  p.groups = in.features / in.block;
  p.padded = (in.block + 15) / 16 * 16;
  p.vector = in.block * size_of(in.dtype) % 16 == 0;
  for (const void* array : {in.u, in.u_gate, in.right, in.right_gate, in.left}) p.vector = p.vector && aligned(array);
  return p;
}

void launch(const HiddenInputs& in, const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream) {
  switch (in.dtype) {
    case Dtype::kFloat32: return in.tf32 ? hidden_tf32(p, sums, stream) : hidden_float(p, sums, stream);
    case Dtype::kBFloat16: return hidden_bfloat16(p, sums, stream);
    case Dtype::kFloat16: return hidden_float16(p, sums, stream);
    default: throw std::invalid_argument("CUDA kernels take float32, bfloat16 and float16");
  }
}

struct Backward {
  HiddenArguments arguments;
  HiddenSums sums;

  Backward(const HiddenBackward& in, Workspace& workspace) : arguments(arguments_of(in)) {
    HiddenArguments& p = arguments;
    const auto floats = [&](int64_t count) {
      return static_cast<float*>(workspace.take(static_cast<std::size_t>(count) * sizeof(float)));
    };
    const auto integers = [&](int64_t count) {
      return static_cast<int*>(workspace.take(static_cast<std::size_t>(count) * sizeof(int)));
    };
    const int64_t pairs = int64_t(p.tokens) * p.top_k;
    p.grad = in.grad;
    p.vector = p.vector && aligned(in.grad);
    p.du = in.du;
    p.du_gate = in.du_gate;
    p.dbias = in.dbias;
    p.pair_of_slot = integers(pairs);
    p.offsets = integers(p.experts + 1);
    if (in.dgates) {
      p.gate_parts = floats(p.groups * pairs);
      sums.of[0] = {p.gate_parts, in.dgates, pairs, p.groups, true};
    }
    // Shared blocks: as many shares of the groups as fill the device; their sums are added up last.
    if (p.own == 1) {
      const int wanted = (4 * dev::limits().multiprocessors + p.experts - 1) / p.experts;
      p.share = std::max(1, (p.groups + wanted - 1) / wanted);
    }
    p.shares = std::max(1, (p.groups + p.share - 1) / p.share);
    p.partial = p.own == 1 && p.shares > 1;
    const int64_t size = int64_t(p.experts) * p.block * p.block;
    int next = 1;
    const auto place = [&](void* result) -> void* {
      if (!result || !p.partial) return result;
      float* const parts = floats(p.shares * size);
      sums.of[next++] = {parts, result, size, p.shares, false};
      return parts;
    };
    p.dright = place(in.dright);
    p.dright_gate = place(in.dright_gate);
    p.dleft = place(in.dleft);
  }
};

}  // namespace

std::size_t workspace_bytes(const HiddenBackward& arguments) {
  Workspace measuring;
  Backward(arguments, measuring);
  return measuring.peak();
}

void hidden_forward(const HiddenForward& in, cudaStream_t stream) {
  HiddenArguments p = arguments_of(in);
  p.out = in.out;
  launch(in, p, {}, stream);
}

void hidden_backward(const HiddenBackward& in, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const Backward call(in, workspace);
  launch(in, call.arguments, call.sums, stream);
}

}  // namespace mpoe::cuda
