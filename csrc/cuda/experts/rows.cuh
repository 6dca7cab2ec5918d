// Tiles of slots of one expert: the result, and the gradients of x and the gates. Rows of a tile meet only in sums over
// slots, of weights' gradients: an Inf or NaN stays with its token and its experts.
#pragma once
#include "cuda/experts/slots.cuh"

namespace mpoe::cuda {

// For units from `first` on, `z` = what is activated, x up plus the bias; of gated ones z is x_gate up_gate plus the
// bias, and `value` = x up.
template <class T, bool kByUnit, bool kGated>
__device__ __forceinline__ void pre_activation(const ExpertsArguments& p, const SlotTile& s, int first, T* stages,
                                               Accumulator<ExpertsTile<T>>& value, Accumulator<ExpertsTile<T>>& z) {
  using TileT = ExpertsTile<T>;
  const int columns = p.units - first;
  const auto multiply = [&](Accumulator<TileT>& sum, const void* rows, const void* up) {
    const int64_t at = p.weight(s.expert, s.group, p.units * p.width) + int64_t(first) * (kByUnit ? p.width : 1);
    const auto a = s.lines<T>(rows, p.groups, p.width, p.vector_in);
    const auto b = expert_lines<T, kByUnit>(up, at, kByUnit ? p.width : p.units, kByUnit ? columns : p.width,
                                            kByUnit ? p.width : columns, p.vector_in);
    sum.clear();
    block_gemm<T, TileT, true, kByUnit>(sum, a, b, p.width, s.rows, columns, stages);
  };
  if (kGated) multiply(value, p.x, p.up);
  kGated ? multiply(z, p.x_gate, p.up_gate) : multiply(z, p.x, p.up);
  if (!p.bias) return;
  const T* const bias = static_cast<const T*>(p.bias) + (int64_t(s.expert) * p.groups + s.group) * p.units + first;
  z.for_each([&](int, int column, float& sum) {
    if (column < columns) sum += dev::to_float(bias[column]);
  });
}

// Grid: groups times choices times tiles. Shared: stages, then hidden units [64][h_stride].
template <class T, bool kByUnit, bool kGated>
__global__ void __launch_bounds__(kExpertsThreads, sizeof(T) == 2 ? 4 : 2)
    experts_forward_kernel(const __grid_constant__ ExpertsArguments p, int h_stride) {
  using TileT = ExpertsTile<T>;
  DYN_SHARED(T, stages);
  T* const h = stages + stage_elements<T>();
  const SlotTile s(p);
  if (s.rows == 0) return;
  for (int first = 0; s.owned && first < p.units; first += TileT::kN) {
    Accumulator<TileT> value, z;
    pre_activation<T, kByUnit, kGated>(p, s, first, stages, value, z);
    with_activation(p.activation, [&](auto activation) {
      z.for_each([&](int, int, float& sum) { sum = activate(activation.value, sum); });
    });
    if (kGated) z.multiply(value);
    z.for_each_pair([&](int row, int column, float v0, float v1) {
      *reinterpret_cast<dev::Pack<T, 2>*>(h + row * h_stride + first + column) = {
          {dev::from_float<T>(v0), dev::from_float<T>(v1)}};
    });
  }
  const int64_t at = p.weight(s.expert, s.group, p.units * p.columns);
  s.wait(p);
  for (int first = 0; first < p.columns; first += TileT::kN) {
    const int columns = p.columns - first;
    Accumulator<TileT> sum;
    sum.clear();
    if (s.owned) {
      const Resident<T, true> a(h, h_stride);  // whole at the barrier with which the product begins
      const auto b = expert_lines<T, false>(p.down, at + first, p.columns, p.units, columns, p.vector_out);
      block_gemm<T, TileT, true, false>(sum, a, b, p.units, s.rows, columns, stages);
      sum.for_each([&](int row, int, float& value) { value *= s.shared().gates[row]; });
    }
    s.add<T>(p, sum, stages, p.out, p.sums, p.columns, first, p.vector_out);
  }
  s.finish(p);
}

// Grid: groups times choices times tiles. Shared: stages.
template <class T, bool kByUnit, bool kGated>
__global__ void __launch_bounds__(kExpertsThreads) experts_rows_kernel(const __grid_constant__ ExpertsArguments p) {
  using TileT = ExpertsTile<T>;
  DYN_SHARED(T, stages);
  SHARED_ARRAY(float, parts, TileT::kWarpsN * kExpertsRows);
  const SlotTile s(p);
  if (s.rows == 0) return;
  const int64_t h_stride = int64_t(p.slice) * p.padded, h_first = s.begin * h_stride + int64_t(s.group) * p.padded;
  float dots[TileT::kRowTiles][2] = {};  // of rows: gradients of their gates
  ROLLED
  for (int first = 0; s.owned && first < p.units; first += TileT::kN) {
    const int columns = p.units - first;
    Accumulator<TileT> value, z, dh;
    pre_activation<T, kByUnit, kGated>(p, s, first, stages, value, z);
    const auto a = s.lines<T>(p.grad, p.groups, p.columns, p.vector_out);
    const int64_t at = p.weight(s.expert, s.group, p.units * p.columns) + int64_t(first) * p.columns;
    const auto b = expert_lines<T, true>(p.down, at, p.columns, columns, p.columns, p.vector_out);
    dh.clear();
    block_gemm<T, TileT, true, true>(dh, a, b, p.columns, s.rows, columns, stages);
    with_activation(p.activation, [&](auto activation) {
      z.for_each_place([&](int row, int, int i, int j, int e) {
        const float gate = s.shared().gates[row];
        const float at_z = z.v[i][j][e], act = activate(activation.value, at_z);
        const float slope = activation_slope(activation.value, at_z);
        const float own = kGated ? value.v[i][j][e] : 1.f, gradient = gate * dh.v[i][j][e];
        dots[i][e / 2] += act * own * dh.v[i][j][e];
        z.v[i][j][e] = gate * act * own;
        dh.v[i][j][e] = gradient * own * slope;
        if (kGated) value.v[i][j][e] = gradient * act;
      });
    });
    const auto store = [&](const Accumulator<TileT>& tile, void* to) {
      T* const line = static_cast<T*>(to) + h_first + first;
      for_each_run(tile, stages, s.rows, p.padded - first, [&](int row, int column, const T* run) {
        using Run16 = dev::Pack<T, 16 / static_cast<int>(sizeof(T))>;
        *reinterpret_cast<Run16*>(line + row * h_stride + column) = *reinterpret_cast<const Run16*>(run);
      });
    };
    if (p.h) store(z, p.h);
    store(kGated ? value : dh, p.dvalue);
    if (kGated) store(dh, p.dz);
  }
  if (p.gate_parts) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, own = threadIdx.x;
    UNROLL
    for (int i = 0; i < 2 * TileT::kRowTiles; ++i) {
      float sum = dots[i / 2][i % 2];
      sum += __shfl_xor_sync(dev::kFullWarp, sum, 1);
      sum += __shfl_xor_sync(dev::kFullWarp, sum, 2);
      const int row = warp / TileT::kWarpsN * TileT::kWarpM + i * 8 + (lane >> 2);
      if ((lane & 3) == 0) parts[warp % TileT::kWarpsN * kExpertsRows + row] = sum;
    }
    __syncthreads();  // parts are whole
    const int64_t at = s.group * p.slots();
    if (own < s.rows) p.gate_parts[at + s.shared().pairs[own]] = parts[own] + parts[kExpertsRows + own];
  }
  const int64_t at = p.weight(s.expert, s.group, p.units * p.width);
  const auto back = [&](Accumulator<TileT>& sum, const void* d, const void* up, int first) {
    if (!s.owned) return;
    const auto a = expert_lines<T, true>(d, h_first, static_cast<int>(h_stride), s.rows, p.units, true);
    const int left = p.width - first, lines = kByUnit ? p.units : left, columns = kByUnit ? left : p.units;
    const auto b = expert_lines<T, !kByUnit>(up, at + int64_t(first) * (kByUnit ? 1 : p.units),
                                             kByUnit ? p.width : p.units, lines, columns, p.vector_in);
    block_gemm<T, TileT, true, !kByUnit>(sum, a, b, p.units, s.rows, p.width - first, stages);
  };
  if (!p.out && !p.out_gate) return;
  s.wait(p);
  ROLLED
  for (int first = 0; first < p.width; first += TileT::kN) {
    Accumulator<TileT> sum;
    if (p.out) {
      sum.clear();
      back(sum, p.dvalue, p.up, first);
      if (kByUnit && kGated) back(sum, p.dz, p.up_gate, first);
      s.add<T>(p, sum, stages, p.out, p.sums, p.width, first, p.vector_in);
    }
    if (!kByUnit && kGated && p.out_gate) {
      sum.clear();
      back(sum, p.dz, p.up_gate, first);
      s.add<T>(p, sum, stages, p.out_gate, p.sums_gate, p.width, first, p.vector_in);
    }
  }
  s.finish(p);
}

}  // namespace mpoe::cuda
