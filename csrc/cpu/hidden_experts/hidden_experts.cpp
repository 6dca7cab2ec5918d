#include "cpu/hidden_experts/hidden_experts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/cpu_features.h"
#include "common/parallel.h"
#include "cpu/routing/routing.h"

namespace mpoe {
namespace {

const HiddenKernels& hidden_kernels(Dtype dtype) {
  return MPOE_TABLE_IN_USE(kHidden)[dtype == Dtype::kBFloat16 ? 1 : 0];
}

std::int64_t padded_block(const HiddenExperts& in) {
  return round_up(in.block, kPanel);
}

// A counting sort per tile of tokens.
struct Sorted {
  Buffer<std::int64_t> slots, owners, offsets;
  Buffer<std::uint8_t> marks, used;
  HiddenSlots view;

  // `parts`: number of parts of the groups.
  Sorted(const HiddenExperts& in, std::int64_t parts)
      : slots(in.tokens * in.top_k),
        owners(in.tokens * in.top_k),
        offsets(tiles_of(in, parts) * (in.experts + 1)),
        marks(in.tokens * in.top_k),
        used(in.experts) {
    const std::int64_t size = tile_of(in, parts);
    view = {size,
            tiles_of(in, parts),
            slots.get(),
            owners.get(),
            marks.get(),
            used.get(),
            true,
            offsets.get(),
            together(in, parts)};
    std::fill_n(used.get(), in.experts, std::uint8_t{0});
    std::int64_t filled = 0;
    std::vector<std::int64_t> latest(in.tokens, -1);  // position of a token's last slot
    for (std::int64_t tile = 0; tile < view.tiles; ++tile) {
      const std::int64_t first = tile * view.tile_tokens * in.top_k;
      const std::int64_t last = std::min(in.tokens, (tile + 1) * view.tile_tokens) * in.top_k;
      std::int64_t* offset = offsets.get() + tile * (in.experts + 1);
      filled = sort_pairs(in.index, {first, last}, in.experts, filled, offset, slots.get());
      for (std::int64_t e = 0; e < in.experts; ++e)
        used.get()[e] |= offset[e + 1] > offset[e];
      for (std::int64_t p = offset[0]; p < filled; ++p) {
        const std::int64_t token = slots.get()[p] / in.top_k;
        owners.get()[p] = token;
        marks.get()[p] = latest[token] < 0 ? kFirst : 0;
        latest[token] = p;
      }
    }
    for (const std::int64_t p : latest) {
      if (p < 0)
        view.complete = false;
      else
        marks.get()[p] |= kLast;
    }
  }

  static std::int64_t together(const HiddenExperts& in, std::int64_t parts) {
    const std::int64_t most = std::max<std::int64_t>(1, ceil_divide(in.groups(), parts));
    if (in.own_groups == 1)
      return most;
    return std::clamp<std::int64_t>(
        kOwnFloats / (padded_block(in) * std::max<std::int64_t>(1, in.tokens)), 1, most);
  }
  static std::int64_t tile_of(const HiddenExperts& in, std::int64_t parts) {
    if (in.own_groups > 1)
      return std::max<std::int64_t>(1, in.tokens);
    return std::max<std::int64_t>(kChunk, kTileFloats / (padded_block(in) * together(in, parts)));
  }
  // At least one, even without tokens: its gradients are zero.
  static std::int64_t tiles_of(const HiddenExperts& in, std::int64_t parts) {
    return std::max<std::int64_t>(1, ceil_divide(in.tokens, tile_of(in, parts)));
  }
};

// Sums of a tile, rows of a chunk, packed blocks of one expert: an upper bound of what the bodies
// use, in whole lines.
std::int64_t scratch_floats(const HiddenExperts& in, const HiddenSlots& sorted, bool packs) {
  const std::int64_t wide = padded_block(in) + kPanel,
                     tokens = std::min(sorted.tile_tokens, in.tokens);
  const std::int64_t blocks = packs ? 6 * wide * wide : 0, of_groups = sorted.together * wide;
  const std::int64_t biases = in.bias == nullptr ? 0 : in.experts * of_groups;
  const std::int64_t sums = (in.u_gate == nullptr ? 1 : 2) * tokens * of_groups;
  const std::int64_t floats = in.experts + sums + 16 * rows_at_once(in, sorted) * wide;
  return round_up(floats + blocks + biases + 4096, 16);
}

// Part `p` of the groups, without sums of cores.
HiddenPart part_of(const HiddenExperts& in,
                   std::int64_t p,
                   std::int64_t parts,
                   float* scratch,
                   float* slot_gates) {
  return {in.groups() * p / parts, in.groups() * (p + 1) / parts, scratch, nullptr, slot_gates};
}

}  // namespace

void hidden_experts(const HiddenExperts& in, void* out) {
  if (in.tokens == 0 || in.features == 0)
    return;
  const HiddenKernels& kernels = hidden_kernels(in.dtype);
  const std::int64_t parts = std::min<std::int64_t>(in.groups(), 2 * num_threads());
  const Sorted sorted(in, parts);
  const std::int64_t size =
      scratch_floats(in, sorted.view, rows_at_once(in, sorted.view) > kFewRows);
  parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    Buffer<float> scratch(size);
    for (std::int64_t p = begin; p < end; ++p)
      kernels.forward(gemm_kernels(in.dtype),
                      in,
                      sorted.view,
                      part_of(in, p, parts, scratch.get(), nullptr),
                      out);
  });
}

void hidden_experts_backward(const HiddenExperts& in,
                             const void* grad,
                             const HiddenExpertsGradients& out) {
  const HiddenKernels& kernels = hidden_kernels(in.dtype);
  const std::int64_t square = in.block * in.block, kinds = in.u_gate == nullptr ? 2 : 3;
  const std::int64_t pairs = in.tokens * in.top_k, groups = in.groups(),
                     cores = in.experts * kinds * square;
  const bool shared = in.own_groups == 1;
  const auto add = gemm_kernels(Dtype::kFloat32).add_row;
  // A part that has sums of all experts' cores, to clear and to add up, gets at least 32 rows per
  // expert.
  const std::int64_t most = std::min<std::int64_t>(groups, shared ? 8 : 2 * num_threads());
  const std::int64_t parts =
      shared ? std::clamp<std::int64_t>(pairs * groups / (32 * in.experts), 1, most) : most;
  const Sorted sorted(in, parts);
  const std::int64_t size = scratch_floats(in, sorted.view, true);
  Buffer<float> slot_gates = zeros<float>(out.dgates == nullptr ? 0 : groups * pairs);
  float* const gates = out.dgates == nullptr ? nullptr : slot_gates.get();
  const auto run = [&](std::int64_t p, float* scratch, float* sums) {
    HiddenPart part = part_of(in, p, parts, scratch, gates);
    part.cores = sums;
    kernels.backward(gemm_kernels(in.dtype), in, sorted.view, part, grad, out);
  };
  if (shared) {
    // As many parts at a time as there are threads, each with its own sums. These are added to the
    // first part's in the order of parts. Only those of experts with slots are written and read.
    const std::int64_t together = std::clamp<std::int64_t>(num_threads(), 1, parts);
    const std::int64_t others = together == parts ? parts - 1 : together;
    Buffer<float> memory((1 + others) * cores + together * size);  // one piece, for huge pages
    float *const total = memory.get(), *const scratch = total + (1 + others) * cores;
    for (std::int64_t first = 0; first < parts; first += together) {
      const std::int64_t last = std::min(parts, first + together),
                         added = std::max<std::int64_t>(first, 1);
      const auto sums_of = [&](std::int64_t p) {
        return p == 0 ? total : total + (1 + p - added) * cores;
      };
      parallel_for(first, last, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t p = begin; p < end; ++p)
          run(p, scratch + (p - first) * size, sums_of(p));
      });
      parallel_for(0, in.experts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t e = begin; e < end; ++e)
          for (std::int64_t p = added; sorted.view.used[e] && p < last; ++p)
            add(sums_of(p) + e * kinds * square, total + e * kinds * square, kinds * square);
      });
    }
    void* const results[] = {out.dright, out.dleft, out.dright_gate};
    for (std::int64_t kind = 0; kind < kinds; ++kind)
      for (std::int64_t e = 0; results[kind] != nullptr && e < in.experts; ++e) {
        void* const result = static_cast<char*>(results[kind]) + e * square * size_of(in.dtype);
        if (sorted.view.used[e])
          gemm_kernels(in.dtype).round_row(total + (e * kinds + kind) * square, result, square);
        else
          std::memset(result, 0, square * size_of(in.dtype));
      }
  } else {
    parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
      Buffer<float> sums(kinds * square), scratch(size);
      for (std::int64_t p = begin; p < end; ++p)
        run(p, scratch.get(), sums.get());
    });
  }
  for (std::int64_t s = 0; out.dgates != nullptr && s < pairs; ++s) {
    float sum = 0;
    for (std::int64_t g = 0; g < groups; ++g)
      sum += slot_gates.get()[g * pairs + s];
    out.dgates[s] = sum;
  }
}

}  // namespace mpoe
