// Grouped product, weight-stationary: a block rebuilds some columns of one expert's weight in shared memory and streams
// the expert's rows past them. No weight is ever in global memory, whatever the bonds.
//
//   half[p, inner] = sum first[p, k] central[k, inner]      for every index of the centre in turn
//   panel[s, kept] = sum half[p, inner] second[inner, q]    (p, q) -> (s, kept)
//   out[row, kept] = activation(sum_s rows[row, s] panel[s, kept] + bias)
//
// `first` is left and `second` right, or vice versa. The transposed product (a gradient with respect to x) is the same
// kernel with the roles of i and j exchanged.
#pragma once
#include "cuda/linear/epilogue.cuh"

namespace mpoe::cuda {

// How far one step along an axis of the panels moves each tensor, in elements.
struct PanelAxis {
  int count = 1;  // panels along it
  int first = 0, central = 0, second = 0, out = 0;
};
// One index of the central core, inside a panel.
struct CentreAxis {
  int count = 1;
  int central = 0, panel = 0;
};

struct PanelArguments {
  Operand first, central, second, rows;
  Output out;
  PanelAxis axis[3];      // of left, centre and right
  CentreAxis summed, kept;
  IndexMap p_at, q_at;    // positions in the panel
  int p = 0, q = 0, inner_first = 0, inner_second = 0;
  int depth = 0, width = 0;  // of the panel: summed and kept indices
  int half_rows = 0, half_stride = 0, panel_rows = 0, panel_stride = 0;
  const int* offsets = nullptr;  // [E + 1]
  int experts = 0, slots = 0;
  int least_rows = 0;  // per block, if several share an expert's rows
};

// Rows [begin, end) that a block has to multiply.
struct RowRange {
  int begin, end;
};
__device__ __forceinline__ RowRange rows_of_block(const PanelArguments& p, int group, int tile) {
  const int begin = p.offsets[group], end = group < p.experts ? p.offsets[group + 1] : p.slots;
  const int parts = static_cast<int>(gridDim.z);
  int share = (end - begin + parts - 1) / parts;
  share = share < p.least_rows ? p.least_rows : share;
  share = (share + tile - 1) / tile * tile;
  const int64_t own = begin + int64_t(share) * blockIdx.z;
  if (own >= end) return {end, end};
  return {static_cast<int>(own), own + share < end ? static_cast<int>(own) + share : end};
}

// Rebuilds one panel. RebuildT: tiles of the two products. Ends without a barrier.
template <class T, class RebuildT, bool kLeftFirst>
__device__ __forceinline__ void rebuild_panel(const PanelArguments& p, int group, const PanelAxis& at, T* panel, T* half,
                                              T* stages) {
  using First = Staged<T, RebuildT, RebuildT::kM, kLeftFirst>;
  using Central = Staged<T, RebuildT, RebuildT::kN, !kLeftFirst>;
  using Second = Staged<T, RebuildT, RebuildT::kN, !kLeftFirst>;
  const int64_t first_base = p.first.expert_stride * group + at.first;
  const int64_t second_base = p.second.expert_stride * group + at.second;
  Accumulator<RebuildT> acc;
  for (int unit = 0; unit < p.summed.count * p.kept.count; ++unit) {
    const int s = unit % p.summed.count, k = unit / p.summed.count;
    const int central_base = at.central + s * p.summed.central + k * p.kept.central;
    const int panel_base = s * p.summed.panel + k * p.kept.panel;
    for (int n = 0; n < p.inner_second; n += RebuildT::kN) {
      for (int m = 0; m < p.p; m += RebuildT::kM) {
        const First a(p.first, first_base, m, p.p, p.inner_first);
        const Central b(p.central, central_base, n, p.inner_second, p.inner_first);
        acc.clear();
        block_gemm<T, RebuildT, kLeftFirst, !kLeftFirst>(acc, a, b, 0, p.inner_first, p.p - m, p.inner_second - n,
                                                         stages);
        // Stores everything: values past the true sizes are zero, and are read as such.
        acc.for_each_pair([&](int row, int column, float v0, float v1) {
          if (m + row >= p.half_rows || n + column >= p.half_stride) return;
          T* to = half + (m + row) * p.half_stride + n + column;
          to[0] = dev::from_float<T>(v0);
          to[1] = dev::from_float<T>(v1);
        });
      }
    }
    for (int n = 0; n < p.q; n += RebuildT::kN) {
      const Second b(p.second, second_base, n, p.q, p.inner_second);
      for (int m = 0; m < p.p; m += RebuildT::kM) {
        const Resident<T, true> a{half + m * p.half_stride, p.half_stride};
        acc.clear();
        block_gemm<T, RebuildT, true, !kLeftFirst>(acc, a, b, 0, p.inner_second, p.p - m, p.q - n, stages);
        const int column = n + acc.own_column();
        const int at_column[2] = {column < p.q ? p.q_at.at(column).inner : 0,
                                  column + 1 < p.q ? p.q_at.at(column + 1).inner : 0};
        __syncthreads();  // nobody reads the stages
        acc.for_each_row(reinterpret_cast<float*>(stages), [&](int row, float v0, float v1) {
          if (m + row >= p.p) return;
          const int at_row = panel_base + p.p_at.at(m + row).inner;
          if (column < p.q) panel[at_row + at_column[0]] = dev::from_float<T>(v0);
          if (column + 1 < p.q) panel[at_row + at_column[1]] = dev::from_float<T>(v1);
        });
      }
    }
  }
}

// Grid: (panels, experts and the rows that no expert owns, shares of an expert's rows).
template <class T, class StreamT, class RebuildT, bool kLeftFirst>
__global__ void __launch_bounds__(StreamT::kThreads, 1) panel_kernel(const __grid_constant__ PanelArguments p) {
  static_assert(StreamT::kThreads == RebuildT::kThreads);
  using Rows = Staged<T, StreamT, StreamT::kM, true>;
  DYN_SHARED(T, shared);
  const int group = blockIdx.y;
  const bool owned = group < p.experts;
  const RowRange range = rows_of_block(p, group, StreamT::kM);
  if (range.begin >= range.end) return;

  T* const panel = shared;
  T* const half = panel + p.panel_rows * p.panel_stride;
  T* const stages = half + p.half_rows * p.half_stride;
  PanelAxis at;
  int rest = blockIdx.x;
  UNROLL
  for (int axis = 2; axis >= 0; --axis) {
    const int index = rest % p.axis[axis].count;
    rest /= p.axis[axis].count;
    at.first += index * p.axis[axis].first;
    at.central += index * p.axis[axis].central;
    at.second += index * p.axis[axis].second;
    at.out += index * p.axis[axis].out;
  }
  if (owned) {
    for (int i = p.depth * p.panel_stride + threadIdx.x; i < p.panel_rows * p.panel_stride; i += StreamT::kThreads) {
      panel[i] = dev::from_float<T>(0.f);  // rows that only complete the last step
    }
    rebuild_panel<T, RebuildT, kLeftFirst>(p, group, at, panel, half, stages);
  }
  const Resident<T, false> weight{panel, p.panel_stride};
  const ColumnPair own(p.out, at.out, Accumulator<StreamT>::own_column(), p.width);
  for (int m = range.begin; m < range.end; m += StreamT::kM) {
    const int rows = range.end - m;
    Accumulator<StreamT> acc;
    acc.clear();
    if (owned) {
      const Rows x(p.rows, 0, m, range.end, p.depth);
      block_gemm<T, StreamT, true, false>(acc, x, weight, 0, p.depth, rows, p.width, stages);
    }
    __syncthreads();  // nobody reads the stages
    acc.for_each_row(reinterpret_cast<float*>(stages), [&](int row, float v0, float v1) {
      if (row >= rows) return;
      const Position position = p.out.m.at(m + row);
      const int64_t to = p.out.row_of(position.slot);
      const float gate = p.out.gates ? p.out.gates[to] : 1.f;
      store_pair<T>(p.out, to * p.out.slot_stride, position.inner, own, v0, v1, owned, gate);
    });
  }
}

}  // namespace mpoe::cuda
