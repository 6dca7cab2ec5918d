// Tiles of rows of one expert, and what follows a product of rows.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/block_gemm.cuh"
#include "cuda/linear/linear.h"

namespace mpoe::cuda {

// At most `most` rows of an expert, or of the slots without one, each of which has `of_slot` rows. All lanes of a warp
// must find the same one.
struct RowTile {
  int expert, begin = 0, rows = 0;  // rows = 0: no tile
  bool owned;                       // by an expert

  __device__ __forceinline__ RowTile(const Slots& of, int of_slot, int tile, int most) {
    const auto first = [&](int e) { return of_slot * (e <= of.experts ? of.offsets[e] : of.slots); };
    const int groups = of.experts + of.clears;
    expert = group_of_tile(tile, groups, [&](int e) { return (first(e + 1) - first(e) + most - 1) / most; });
    owned = expert < of.experts;
    if (expert >= groups) return;
    begin = first(expert) + tile * most;
    rows = first(expert + 1) - begin < most ? first(expert + 1) - begin : most;
  }
};

// A run of the result: its slot, where it begins in the slot's row, and how many elements are there.
struct Place {
  int slot, column, count;
};

// Stores a tile, of which place(row, column) says where it belongs, to rows of `width` elements. vector: runs of 16
// bytes in the tile are so in memory, and there as a whole or not at all.
template <class T, class TileT, class Of>
__device__ __forceinline__ void finish(Accumulator<TileT>& sum, T* stages, int rows, int columns, bool owned,
                                       bool vector, void* out, int width, const Epilogue& last, const Of& place) {
  const auto store = [&](void* to, const int64_t* index, const float* gates) {
    for_each_run(sum, stages, rows, columns, [&](int row, int column, const T* values) {
      constexpr int kPer = 16 / static_cast<int>(sizeof(T));
      const auto store_some = [&](auto per, int i) {
        constexpr int kOwn = decltype(per)::value;
        const Place at = place(row, column + i);
        if (at.count <= 0) return;
        const int64_t line = index ? index[at.slot] : at.slot;
        const float gate = gates && owned ? gates[line] : 1.f;
        dev::Pack<float, kOwn> gated = dev::load<kOwn>(values + i);
        UNROLL
        for (int j = 0; j < kOwn; ++j) gated.v[j] *= gate;
        dev::store(gated, static_cast<T*>(to) + line * width + at.column);
      };
      if (vector) return store_some(std::integral_constant<int, kPer>{}, 0);
      for (int i = 0; i < kPer; ++i) store_some(std::integral_constant<int, 1>{}, i);
    });
  };
  if (last.bias && owned) {
    const T* const bias = static_cast<const T*>(last.bias);
    sum.for_each([&](int row, int column, float& value) {
      const Place at = place(row, column);
      if (at.count > 0) value += dev::to_float(bias[at.column]);
    });
  }
  if (last.pre_activation) store(last.pre_activation, nullptr, nullptr);
  with_activation(last.activation, [&](auto activation) {
    sum.for_each([&](int, int, float& value) { value = activate(activation.value, value); });
  });
  store(out, last.out_index, last.gates);
}

}  // namespace mpoe::cuda
