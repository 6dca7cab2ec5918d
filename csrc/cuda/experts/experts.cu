#include "cuda/experts/experts.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/experts/weights.cuh"
#include "cuda/routing/routing.h"

namespace mpoe::cuda {
namespace {

// What a call launches, with its memory. Slots are sorted first.
struct Call {
  ExpertsLaunches p;
  Route route;

  Call(const ExpertsInputs& in, const void* grad, const Memory& memory) : memory_(memory) {
    static_cast<ExpertsInputs&>(p) = in;
    if (in.units < 1 || in.units > kMostUnits) {
      throw std::invalid_argument("the kernels take 1 to " + std::to_string(kMostUnits) +
                                  " hidden units of an expert in a group; got " + std::to_string(in.units));
    }
    const int64_t slots = p.slots(), partly = std::min(in.tokens, in.experts + 1);  // tiles with less than 64 slots
    const int64_t tiles = in.tokens / kExpertsRows + partly;
    if (slots >= 1 << 30 || tiles * in.top_k * in.groups >= 1 << 30) {
      throw std::invalid_argument("the kernels count pairs of token and choice, and tiles of them, to 2^30");
    }
    if (in.by_unit) p.x_gate = in.x;
    p.tiles = static_cast<int>(tiles);
    p.slice = in.groups;
    const int chunk = 16 / static_cast<int>(size_of(in.dtype));
    p.padded = (in.units + chunk - 1) / chunk * chunk;
    p.vector_in = whole(chunk, {in.width, in.by_unit ? 0 : in.units}, {in.x, p.x_gate, in.up, in.up_gate});
    p.vector_out = whole(chunk, {in.columns}, {in.down, grad});
    route.index = in.index;
    route.tokens = in.tokens;
    route.top_k = in.top_k;
    route.experts = in.experts;
    p.offsets = route.offsets = take<int>(int64_t(in.top_k) * (in.experts + 1));
    p.pair_of_slot = route.pair_of_slot = take<int>(slots);
    route.cleared_size = 2 * in.groups;
    p.turns = route.cleared = take<int>(route.cleared_size);
  }

  void run(cudaStream_t stream) {
    mpoe::cuda::route(route, memory_, stream);
    for (; p.first_group < p.groups; p.first_group += p.slice, p.weights.first_share += p.weights.shares) {
      p.slice = std::min(p.slice, p.groups - p.first_group);
      ExpertsLaunches own = p;
      const int64_t before = int64_t(p.first_group) * p.padded * static_cast<int64_t>(size_of(p.dtype));
      for (void** rows : {&own.h, &own.dvalue, &own.dz}) {
        if (*rows) *rows = static_cast<char*>(*rows) - before;
      }
      for (WeightGradient& weight : own.weights.of) {
        for (SummedLines* lines : {&weight.a, &weight.b}) {
          lines->stride = int64_t(lines->by_token ? p.groups : p.slice) * lines->step;
          if (weight.out && !lines->by_token) lines->data = static_cast<const char*>(lines->data) - before;
        }
      }
      with_type(p.dtype, [&](auto zero) { launch<decltype(zero)>(own, stream); });
    }
  }

  template <class T>
  T* take(int64_t count) {
    return mpoe::cuda::take<T>(memory_, count);
  }
  void* take_rows() { return take<char>(p.slots() * p.slice * p.padded * size_of(p.dtype)); }
  // Of more than two choices: every sum in a 16-bit type rounds.
  float* take_sums(const void* out, int width) {
    const bool are = out && p.top_k > 2 && size_of(p.dtype) == 2;
    return are ? take<float>(int64_t(p.tokens) * p.groups * width) : nullptr;
  }

 private:
  const Memory& memory_;
};

}  // namespace

void experts_forward(const ExpertsForward& in, const Memory& memory, cudaStream_t stream) {
  Call call(in, nullptr, memory);
  call.p.out = in.out;
  call.p.sums = call.take_sums(in.out, in.columns);
  call.run(stream);
}

void experts_backward(const ExpertsBackward& in, const Memory& memory, cudaStream_t stream) {
  Call call(in, in.grad, memory);
  ExpertsLaunches& p = call.p;
  p.is_backward = true;
  p.grad = in.grad;
  // So few groups at a time that what is kept of them stays in the L2 cache.
  const int64_t kept = p.slots() * p.padded * size_of(p.dtype) * (1 + (in.ddown != nullptr) + p.gated());
  p.slice = static_cast<int>(std::clamp<int64_t>(dev::limits().cache_bytes / 3 / kept, 1, p.groups));
  if (in.ddown) p.h = call.take_rows();
  p.dvalue = call.take_rows();
  if (p.gated()) p.dz = call.take_rows();
  p.out = in.dx;
  p.out_gate = in.dx_gate;
  p.sums = call.take_sums(in.dx, in.width);
  p.sums_gate = call.take_sums(in.dx_gate, in.width);
  p.gate_parts = in.dgates;
  if (in.dgates && p.groups > 1) {
    p.gate_parts = call.take<float>(p.groups * p.slots());
    p.parts.of[3] = {p.gate_parts, in.dgates, p.slots(), p.groups, true};
  }
  p.dbias = in.dbias;
  WeightGradients& all = p.weights;
  const auto tiles = [](int extent) { return (extent + kExpertsRows - 1) / kExpertsRows; };
  // Shared weights: as many shares of the groups as fill the device; their sums are added up last.
  if (p.own == 1 && p.groups > 1) {
    const int wanted = (4 * dev::limits().multiprocessors + p.experts - 1) / p.experts;
    all.share = (p.slice + wanted - 1) / wanted;
    all.shares = (p.slice + all.share - 1) / all.share;
    all.partial = all.shares > 1 || p.slice < p.groups;
  }
  int kind = 0;
  const auto place = [&](void* out, const SummedLines& a, const SummedLines& b) {
    const int own = kind++;
    if (!out) return;
    all.tiles = std::max(all.tiles, tiles(a.width) * tiles(b.width));
    all.of[own] = {a, b, out};
    if (!all.partial) return;
    const int64_t size = int64_t(p.experts) * a.width * b.width;
    const int count = (p.groups + p.slice - 1) / p.slice * all.shares;
    float* const parts = call.take<float>(count * size);
    p.parts.of[own] = {parts, out, size, count, false};
    all.of[own].out = parts;
  };
  const auto inputs = [&](const void* x) { return SummedLines{x, in.width, in.width, true, p.vector_in}; };
  const auto units = [&](const void* d) { return SummedLines{d, in.units, p.padded, false, true}; };
  const auto place_up = [&](void* out, const void* x, const void* d) {
    in.by_unit ? place(out, units(d), inputs(x)) : place(out, inputs(x), units(d));
  };
  place_up(in.dup, p.x, p.dvalue);
  place_up(in.dup_gate, p.x_gate, p.dz);
  place(in.ddown, units(p.h), SummedLines{in.grad, in.columns, in.columns, true, p.vector_out});
  call.run(stream);
}

}  // namespace mpoe::cuda
