// Host side: tensors whose inner axes have names, and the index maps that a contraction of two of them needs. Which
// axes form m, n and k of a matrix product follows from the names alone: shared ones are summed, the others remain.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/types.h"
#include "cuda/index.cuh"

namespace mpoe::cuda {

// Axes of the folded blocks left [iL, jL, a], central [a, iC, jC, b], right [b, iR, jR].
enum Axis : int { kIL, kJL, kA, kIC, kJC, kB, kIR, kJR, kAxes };
using Axes = std::vector<Axis>;  // in memory order, slowest first

struct Dims {
  int size[kAxes] = {};
  int in_features = 0, out_features = 0;  // true sizes; the products of the factors may exceed them

  int64_t elements(const Axes& axes) const {
    int64_t product = 1;
    for (const Axis axis : axes) product *= size[axis];
    return product;
  }
};

// Axis order in memory of a block, or of what is built from blocks.
inline Axes layout_of(const std::string& name) {
  if (name == "L") return {kIL, kJL, kA};
  if (name == "C") return {kA, kIC, kJC, kB};
  if (name == "R") return {kB, kIR, kJR};
  if (name == "LC") return {kIL, kJL, kIC, kJC, kB};
  throw std::invalid_argument("no block is called '" + name + "'");
}

// Rows [slot, axes] of activations or blocks [expert, axes].
struct Named {
  void* data = nullptr;
  int64_t stride[kAxes] = {};  // elements; 0: not an axis of this tensor
  int64_t outer = 0;           // elements from one slot or expert to the next; 0: shared by all experts
  int limit = 0x7fffffff;      // offsets inside a row from here on are padding

  bool has(Axis axis) const { return stride[axis] != 0; }
  Axes axes() const {  // slowest first
    Axes found;
    for (int axis = 0; axis < kAxes; ++axis) {
      if (stride[axis]) found.push_back(static_cast<Axis>(axis));
    }
    std::stable_sort(found.begin(), found.end(), [&](Axis p, Axis q) { return stride[p] > stride[q]; });
    return found;
  }
};

inline Named named(const void* data, const Axes& axes, const Dims& dims, int64_t outer) {
  Named tensor;
  tensor.data = const_cast<void*>(data);
  tensor.outer = outer;
  int64_t step = 1;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    tensor.stride[*axis] = step;
    step *= dims.size[*axis];
  }
  return tensor;
}
// Rows of dense activations; `columns` is their true size, which the axes may pad.
inline Named rows_of(const void* data, const Axes& axes, const Dims& dims, int64_t columns) {
  Named tensor = named(data, axes, dims, columns);
  if (columns != dims.elements(axes)) tensor.limit = static_cast<int>(columns);
  return tensor;
}

// Axes sorted slowest first by `by`.
inline Axes sorted(Axes axes, const Named& by) {
  std::stable_sort(axes.begin(), axes.end(), [&](Axis p, Axis q) { return by.stride[p] > by.stride[q]; });
  return axes;
}

// Two maps over the same digits, one for each tensor. Axes of size 1 are left out; axes that are adjacent in both
// tensors become one digit. `outer_first`: the first digit is the slot or expert, with the tensor's `outer` as stride.
struct MapPair {
  IndexMap first, second;
  int64_t inner = 1;  // product of the sizes without the outer digit
};
inline MapPair map_pair(const Axes& axes, const Dims& dims, const Named& p, const Named& q, bool outer_first) {
  struct Digit {
    int64_t size, p, q;
  };
  std::vector<Digit> digits;
  MapPair maps;
  for (const Axis axis : axes) {
    const int64_t size = dims.size[axis];
    if (size == 1) continue;
    maps.inner *= size;
    const Digit digit{size, p.stride[axis], q.stride[axis]};
    if (!digits.empty() && digits.back().p == size * digit.p && digits.back().q == size * digit.q) {
      digits.back() = {digits.back().size * size, digit.p, digit.q};
    } else {
      digits.push_back(digit);
    }
  }
  if (outer_first) digits.insert(digits.begin(), Digit{1, 0, 0});
  if (digits.empty()) digits.push_back({1, 1, 1});
  if (digits.size() > static_cast<std::size_t>(kMaxDigits)) {
    throw std::invalid_argument("a dimension of " + std::to_string(digits.size()) + " digits; the kernels take " +
                                std::to_string(kMaxDigits));
  }
  for (std::size_t d = 0; d < digits.size(); ++d) {
    maps.first.size[d] = maps.second.size[d] = FastDiv(static_cast<uint32_t>(digits[d].size));
    maps.first.stride[d] = static_cast<int>(digits[d].p);
    maps.second.stride[d] = static_cast<int>(digits[d].q);
  }
  maps.first.digits = maps.second.digits = static_cast<int>(digits.size());
  maps.first.slot_first = maps.second.slot_first = outer_first;
  return maps;
}

inline bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

// Whether every stride of a map, except the last digit's if `except_last`, is a multiple of `step`. A slot has none.
inline bool strides_divide(const IndexMap& map, bool except_last, int step) {
  for (int d = map.slot_first ? 1 : 0; d < map.digits - (except_last ? 1 : 0); ++d) {
    if (map.stride[d] % step != 0) return false;
  }
  return true;
}
// Whether runs of `step` elements along `along` are contiguous and aligned, whatever the position along `across`.
inline bool runs(const Named& tensor, const IndexMap& along, const IndexMap& across, int step) {
  const int last = along.digits - 1;
  return !(along.slot_first && last == 0) && along.stride[last] == 1 &&
         along.size[last].divisor % static_cast<uint32_t>(step) == 0 && strides_divide(along, true, step) &&
         strides_divide(across, false, step) && tensor.outer % step == 0 && aligned(tensor.data);
}

// An operand read along k or along mn, as the kernel was compiled.
inline Operand operand_along(const Named& tensor, const IndexMap& mn, const IndexMap& k, bool slots, Dtype dtype,
                             bool k_major, const int64_t* rows = nullptr) {
  Operand operand;
  operand.data = tensor.data;
  (slots ? operand.slot_stride : operand.expert_stride) = tensor.outer;
  operand.rows = rows;
  operand.mn = mn;
  operand.k = k;
  operand.limit = tensor.limit;
  const int chunk = 16 / static_cast<int>(size_of(dtype));
  operand.k_major = k_major;
  operand.vector = k_major ? runs(tensor, k, mn, chunk) : runs(tensor, mn, k, chunk);
  return operand;
}

// What follows the last product of rows.
struct Epilogue {
  const void* bias = nullptr;
  int activation = 0;
  void* pre_activation = nullptr;  // like the result, or null
  const int64_t* rows = nullptr;   // where every slot's row goes; null: to the slot's own place
  const float* gates = nullptr;    // by row; null: 1
};

inline Output output_of(const Named& out, const IndexMap& m, const IndexMap& n, bool slots, bool as_float, Dtype dtype,
                        const Epilogue& epilogue = {}) {
  Output output;
  output.data = out.data;
  (slots ? output.slot_stride : output.expert_stride) = out.outer;
  output.m = m;
  output.n = n;
  output.limit = out.limit;
  output.as_float = as_float;
  output.bias = epilogue.bias;
  output.activation = epilogue.activation;
  output.pre_activation = epilogue.pre_activation;
  output.rows = epilogue.rows;
  output.gates = epilogue.gates;
  const int last = n.digits - 1;
  const auto addresses = reinterpret_cast<std::uintptr_t>(out.data) |
                         reinterpret_cast<std::uintptr_t>(epilogue.pre_activation);
  output.pair = !as_float && n.stride[last] == 1 && n.size[last].divisor % 2 == 0 && strides_divide(n, true, 2) &&
                strides_divide(m, false, 2) && out.outer % 2 == 0 &&
                addresses % static_cast<std::uintptr_t>(2 * size_of(dtype)) == 0;
  return output;
}

}  // namespace mpoe::cuda
