// Tiles of rows of one expert; what follows a product of them; columns as digits of three cores.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/block_gemm.cuh"
#include "cuda/linear/linear.h"

namespace mpoe::cuda {

// At most `most` slots of an expert, or of those without one. All lanes of a warp must find the
// same tile.
struct RowTile {
  int expert;
  int begin = 0;
  int rows = 0;  // 0: no tile
  bool owned;    // by an expert

  __device__ __forceinline__ RowTile(const Slots& of, int tile, int most) {
    const auto first = [&](int e) {
      return e <= of.experts ? of.offsets[e] : of.slots;
    };
    const auto tiles = [&](int e) {
      return (first(e + 1) - first(e) + most - 1) / most;
    };
    const int groups = of.experts + 1;
    expert = group_of_tile(tile, groups, tiles);
    owned = expert < of.experts;
    if (expert == groups)
      return;
    begin = first(expert) + tile * most;
    rows = first(expert + 1) - begin < most ? first(expert + 1) - begin : most;
  }
};

// A run of the result: its slot, where it begins in the slot's row, its number of elements.
struct Place {
  int slot;
  int column;
  int count;
};

// Where a result goes.
struct OutRows {
  void* data;
  int width;    // elements of a row
  bool vector;  // runs of 16 bytes in a tile are so in memory, and there as a whole or not at all
  Epilogue last;
};

// Stores a tile, of which place(row, column) says where it belongs.
template <class T, class TileT, class Of>
__device__ __forceinline__ void finish(Accumulator<TileT>& sum,
                                       T* stages,
                                       int rows,
                                       int columns,
                                       bool owned,
                                       const OutRows& out,
                                       const Of& place) {
  const Epilogue& last = out.last;
  const auto store = [&](void* to, const int64_t* index, const float* gates) {
    for_each_run(sum, stages, rows, columns, [&](int row, int column, const T* values) {
      constexpr int kPer = 16 / static_cast<int>(sizeof(T));
      const auto store_pack = [&](auto per, int i) {
        constexpr int kCount = decltype(per)::value;
        const Place at = place(row, column + i);
        if (at.count <= 0)
          return;
        const int64_t line = index ? index[at.slot] : at.slot;
        const float gate = gates && owned ? gates[line] : 1.f;
        dev::Pack<float, kCount> gated = dev::load<kCount>(values + i);
        UNROLL
        for (int j = 0; j < kCount; ++j)
          gated.v[j] *= gate;
        dev::store(gated, static_cast<T*>(to) + line * out.width + at.column);
      };
      if (out.vector) {
        store_pack(std::integral_constant<int, kPer>{}, 0);
        return;
      }
      for (int i = 0; i < kPer; ++i)
        store_pack(std::integral_constant<int, 1>{}, i);
    });
  };
  if (last.bias && owned) {
    const T* const bias = static_cast<const T*>(last.bias);
    sum.for_each([&](int row, int column, float& value) {
      const Place at = place(row, column);
      if (at.count > 0)
        value += dev::to_float(bias[at.column]);
    });
  }
  if (last.pre_activation)
    store(last.pre_activation, nullptr, nullptr);
  with_activation(last.activation, [&](auto activation) {
    sum.for_each([&](int, int, float& value) { value = activate(activation.value, value); });
  });
  store(out.data, last.out_index, last.gates);
}

// Quotient by a divisor known at launch, of numbers below 2^31 (Granlund, Montgomery, PLDI 1994).
struct FastDiv {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d) {
    while ((1ull << shift) < d)
      ++shift;
    multiplier = static_cast<uint32_t>((((1ull << shift) - d) << 32) / d + 1);
  }
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>(
        (__umulhi(static_cast<uint32_t>(n), multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
};

// A tile has `units` digits of left, one of central and a run of digits of right, which are
// adjacent in memory.
struct Digits {
  int size[3] = {1, 1, 1};
  int columns = 1;  // in memory; the rest is padding
  int units = 1;
  FastDiv run;

  Digits() = default;
  Digits(const int (&sizes)[3], int real) : size{sizes[0], sizes[1], sizes[2]}, columns(real) {}
  __host__ __device__ int run_length() const { return static_cast<int>(run.divisor); }
  __host__ __device__ int left_tiles() const { return (size[0] + units - 1) / units * size[1]; }
  __host__ __device__ int right_tiles() const {
    return (size[2] + run_length() - 1) / run_length();
  }
};

// One tile: its first digits, how many there are, and where its columns are.
struct DigitTile {
  const Digits& of;
  int left;
  int centre;
  int right;
  int units;
  int run;

  // left_tile: below left_tiles(), right_tile: below right_tiles().
  __device__ __forceinline__ DigitTile(const Digits& digits, int left_tile, int right_tile)
      : of(digits) {
    left = left_tile / of.size[1] * of.units;
    centre = left_tile % of.size[1];
    right = right_tile * of.run_length();
    units = of.size[0] - left < of.units ? of.size[0] - left : of.units;
    run = of.size[2] - right < of.run_length() ? of.size[2] - right : of.run_length();
  }
  __device__ __forceinline__ int first() const {
    return (left * of.size[1] + centre) * of.size[2] + right;
  }
  __device__ __forceinline__ int width() const { return (units - 1) * of.run_length() + run; }
  // Column of the tile -> place after first().
  __device__ __forceinline__ Run operator()(int column) const {
    const int unit = of.run.divide(column);
    const int at = column - unit * of.run_length();
    const int offset = unit * of.size[1] * of.size[2] + at;
    const int memory = of.columns - first() - offset;
    if (unit >= units)
      return {offset, 0};
    return {offset, run - at < memory ? run - at : memory};
  }
};

// Digits x and y of line or column number i of pairs of them, of which `of_y` have the same x.
struct DigitPair {
  int x;
  int y;
  __device__ __forceinline__ DigitPair(int i, int of_y) : x(i / of_y), y(i - x * of_y) {}
};

// Where the elements go that a thread holds of a product whose digits are regrouped: the sum of a
// number of the row and of one of the column, negative: nowhere.
template <class TileT>
struct Places {
  int row[2 * TileT::kRowTiles];
  int column[2 * TileT::kColumnTiles];

  template <class RowPlace, class ColumnPlace>
  __device__ __forceinline__ Places(RowPlace&& of_row, ColumnPlace&& of_column) {
    Accumulator<TileT>::for_each_place([&](int r, int c, int i, int j, int e) {
      if (j == 0 && e % 2 == 0)
        row[i * 2 + e / 2] = of_row(r);
      if (i == 0 && e < 2)
        column[j * 2 + e] = of_column(c);
    });
  }
  // pairs: columns 2n and 2n + 1 stay adjacent, at an even place.
  template <class T>
  __device__ __forceinline__ void store(const Accumulator<TileT>& product,
                                        T* to,
                                        bool pairs) const {
    product.for_each_place([&](int, int, int i, int j, int e) {
      const int at = row[i * 2 + e / 2] + column[j * 2 + e % 2];
      const T value = dev::from_float<T>(product.v[i][j][e]);
      if (!pairs) {
        if (at >= 0)
          to[at] = value;
      } else if (e % 2 == 0 && at >= 0) {
        *reinterpret_cast<dev::Pack<T, 2>*>(to + at) = {
            {value, dev::from_float<T>(product.v[i][j][e + 1])}};
      }
    });
  }
};
constexpr int kNowhere = -(1 << 20);

}  // namespace mpoe::cuda
