// Bodies of gemm.h. Included by one file per instruction set, which defines MPOE_GEMM, the name of
// its table.
#include <algorithm>
#include <utility>

#include "cpu/gemm/dots.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/math.h"
#include "cpu/gemm/pack.h"
#include "cpu/gemm/vector.h"

namespace mpoe {
namespace {

constexpr int64_t kPanelBytes = kPanel * kUnitBytes;  // of one unit

// Row offsets in a tile, in few registers: r = odd << shift, and x86 addresses scale by 1, 2, 4 and
// 8. Left to itself, the compiler keeps one register per row and runs out of them.
template <int rows>
struct RowOffsets {
  int64_t odd[(rows + 1) / 2];
  // By additions in registers. Compilers would multiply in vectors and reload the elements from the
  // stack, and a load that no single store can forward to waits for all earlier stores: the
  // previous tile's results, on their way to memory.
  explicit RowOffsets(int64_t stride) {
    odd[0] = stride;
#pragma GCC unroll 8
    for (int i = 1; i < (rows + 1) / 2; ++i) {
      odd[i] = odd[i - 1] + 2 * stride;
      asm("" : "+r"(odd[i]));
    }
  }
  // Once per loop iteration: keeps the compiler from hoisting the multiples out of the loop.
  void renew() {
#pragma GCC unroll 8
    for (int i = 0; i < rows / 2; ++i)
      asm("" : "+r"(odd[i]));
  }
  int64_t operator[](int r) const {
    if (r == 0)
      return 0;
    const int shift = __builtin_ctz(r);
    return odd[r >> (shift + 1)] << shift;
  }
};

// Columns of a packed panel: offsets known at compile time.
struct UnitOffsets {
  explicit UnitOffsets(int64_t) {}
  void renew() {}
  constexpr int64_t operator[](int r) const { return r * kUnitBytes; }
};

// One step of a unit (vector.h): every row's broadcast times the vectors of the right operand.
template <class T, int step, int rows, int vectors, class Offsets>
inline void multiply_step(Floats (&acc)[rows][vectors],
                          const char* a,
                          const Offsets& offset,
                          const char* panel) {
  using Product = UnitProduct<T>;
  typename Product::Operand right[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    right[v] = Product::template load<step>(panel + v * kWidth * kUnitBytes);
    if constexpr (rows > 1)
      keep(right[v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const auto left = Product::template broadcast<step>(a + offset[r]);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      acc[r][v] = Product::multiply(acc[r][v], left, right[v]);
  }
}

// One register tile: `rows` x (vectors * kWidth) columns. All of it stays in registers throughout
// the loop over k.
template <class T, int rows, int vectors, class Offsets>
inline void register_tile(int64_t units,
                          const char* a,
                          int64_t a_row,
                          int64_t a_unit,
                          const char* panel,
                          float* tile,
                          int64_t tile_stride,
                          bool accumulate) {
  Offsets offset(a_row);
  Floats acc[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      acc[r][v] = Floats{};
#pragma GCC unroll 1
  for (int64_t u = 0; u < units; ++u) {
    offset.renew();
    multiply_step<T, 0, rows, vectors>(acc, a, offset, panel);
    if constexpr (UnitProduct<T>::kSteps == 2) {
      asm volatile(
          "" ::
              : "memory");  // load again: there are no registers to keep the first step's operands
      offset.renew();
      multiply_step<T, 1, rows, vectors>(acc, a, offset, panel);
    }
    a += a_unit;
    panel += kPanelBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* target = tile + r * tile_stride + v * kWidth;
      // The previous contents are added last: sums of sums round less than one long sum.
      store_floats(target, accumulate ? acc[r][v] + load_floats(target) : acc[r][v]);
    }
}

template <class T, bool by_columns, int vectors, int rows>
void tile_of(int64_t units,
             const char* a,
             int64_t a_row,
             const char* panel,
             float* tile,
             int64_t tile_stride,
             bool accumulate,
             int64_t columns) {
  for (int64_t c = 0; c < columns; c += vectors * kWidth)
    register_tile<T, rows, vectors, std::conditional_t<by_columns, UnitOffsets, RowOffsets<rows>>>(
        units,
        a,
        a_row,
        by_columns ? kPanelBytes : kUnitBytes,
        panel + c * kUnitBytes,
        tile + c,
        tile_stride,
        accumulate);
}

using TileFunction =
    void (*)(int64_t, const char*, int64_t, const char*, float*, int64_t, bool, int64_t);

template <class T, bool by_columns, int vectors, int... rows>
TileFunction pick_tile(int64_t count, std::integer_sequence<int, rows...>) {
  static constexpr TileFunction kFunctions[] = {tile_of<T, by_columns, vectors, rows + 1>...};
  return kFunctions[count - 1];
}

template <class T, int64_t columns>
void multiply_rows(int64_t rows,
                   int64_t units,
                   const void* a,
                   int64_t a_stride,
                   const void* panel,
                   float* tile,
                   int64_t tile_stride,
                   bool accumulate) {
  constexpr int kVectors = std::min<int>(kTileVectors, columns / kWidth);
  for_each_tile(rows, UnitProduct<T>::kRows, [&](int64_t first, int64_t count) {
    pick_tile<T, false, kVectors>(count, std::make_integer_sequence<int, UnitProduct<T>::kRows>{})(
        units,
        static_cast<const char*>(a) + first * a_stride * kUnitBytes,
        a_stride * kUnitBytes,
        static_cast<const char*>(panel),
        tile + first * tile_stride,
        tile_stride,
        accumulate,
        columns);
  });
}

template <class T>
void multiply_columns(int64_t rows,
                      int64_t units,
                      const void* a,
                      const void* panel,
                      float* tile,
                      int64_t tile_stride,
                      bool accumulate) {
  pick_tile<T, true, kTileVectors>(rows, std::make_integer_sequence<int, UnitProduct<T>::kRows>{})(
      units,
      static_cast<const char*>(a),
      0,
      static_cast<const char*>(panel),
      tile,
      tile_stride,
      accumulate,
      kPanel);
}

template <class T>
void store(const float* tile, int64_t rows, int64_t columns, void* out, int64_t stride) {
  T* target = static_cast<T*>(out);
  for (int64_t r = 0; r < rows; ++r)
    store_row(tile + r * kPanel, target + r * stride, columns);
}

// Scatters a rounded row of a tile to its granules.
template <class T>
inline void scatter(const T* row, T* out, const ColumnMap& columns) {
  for (int64_t g = 0; g < kGranules; ++g) {
    if (columns.valid[g] == kGranule)
      std::memcpy(out + columns.offset[g], row + g * kGranule, kGranule * sizeof(T));
    else
      for (int32_t c = 0; c < columns.valid[g]; ++c)
        out[columns.offset[g] + c] = row[g * kGranule + c];
  }
}

template <class T, Activation kind>
void finish_as(const float* tile,
               int64_t rows,
               T* out,
               const int64_t* row_offset,
               int64_t stride,
               const ColumnMap& columns,
               const Finish& finish) {
  bool together = true;
  for (int64_t g = 0; g < kGranules; ++g)
    together = together && columns.valid[g] == kGranule &&
               columns.offset[g] == columns.offset[0] + g * kGranule;
  T* saved = static_cast<T*>(finish.saved);
  alignas(64) T before[kPanel];
  alignas(64) T after[kPanel];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = row_offset == nullptr ? r * stride : row_offset[r];
    T* const after_row = together ? out + offset + columns.offset[0] : after;
    T* const before_row =
        together && saved != nullptr ? saved + offset + columns.offset[0] : before;
    const float* bias = finish.bias;
    if (bias != nullptr && finish.bias_offset != nullptr)
      bias += finish.bias_offset[r];
    for (int64_t c = 0; c < kPanel; c += kWidth) {
      Floats z = load_floats(tile + r * kPanel + c);
      if (bias != nullptr)
        z += load_floats(bias + c);
      if (saved != nullptr)
        store_floats(before_row + c, z);
      store_floats(after_row + c, activate<kind>(z));
    }
    if (together)
      continue;
    scatter(after, out + offset, columns);
    if (saved != nullptr)
      scatter(before, saved + offset, columns);
  }
}

template <class T>
void finish(const float* tile,
            int64_t rows,
            void* out,
            const int64_t* row_offset,
            int64_t stride,
            const ColumnMap& columns,
            const Finish& finish) {
  T* target = static_cast<T*>(out);
  with_activation(finish.activation, [&](auto kind) {
    finish_as<T, decltype(kind)::value>(tile, rows, target, row_offset, stride, columns, finish);
  });
}

// Units of a tile's row, in the order of the panel.
inline void row_units(const float* row, float* units, float) {
  for (int64_t c = 0; c < kPanel; c += kWidth)
    store_floats(units + c, load_floats(row + c));
}
inline void row_units(const float* row, uint32_t* units, BFloat16) {
  constexpr int64_t kHalf = kPanel / 2;
  for (int64_t c = 0; c < kHalf; c += kWidth) {
    const Words low = bfloat16_bits(load_floats(row + c));
    const Words high = bfloat16_bits(load_floats(row + kHalf + c));
    store_vector(units + c, low | high << 16);
  }
}

template <class T>
void store_units(const float* tile,
                 int64_t rows,
                 void* out,
                 const int32_t* row_unit,
                 int64_t row_stride,
                 const int32_t* which,
                 const int32_t* unit_offset) {
  constexpr int64_t kRowGranules = kGranules * sizeof(T) / kUnitBytes;
  alignas(64) std::conditional_t<sizeof(T) == 2, uint32_t, float> units[kPanel];
  for (int64_t r = 0; r < rows; ++r) {
    row_units(tile + r * kPanel, units, T{});
    const int32_t* start = row_unit + r * row_stride;
    for (int64_t g = 0; g < kRowGranules; ++g)
      std::memcpy(
          static_cast<char*>(out) + (int64_t{start[which[g]]} + unit_offset[g]) * kUnitBytes,
          units + g * kGranule,
          kGranule * kUnitBytes);
  }
}

template <class T, Activation kind>
void backward_as(const T* grad, const T* saved, T* dz, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    store_floats(dz + i, deactivate<kind>(load_floats(grad + i), load_floats(saved + i)));
  if (i == count)
    return;
  alignas(64) T tail[3][kWidth] = {};
  std::memcpy(tail[0], grad + i, (count - i) * sizeof(T));
  std::memcpy(tail[1], saved + i, (count - i) * sizeof(T));
  store_floats(tail[2], deactivate<kind>(load_floats(tail[0]), load_floats(tail[1])));
  std::memcpy(dz + i, tail[2], (count - i) * sizeof(T));
}

template <class T>
void activation_backward(
    Activation activation, const void* grad, const void* saved, void* dz, int64_t count) {
  const T* g = static_cast<const T*>(grad);
  const T* s = static_cast<const T*>(saved);
  T* out = static_cast<T*>(dz);

  with_activation(activation,
                  [&](auto kind) { backward_as<T, decltype(kind)::value>(g, s, out, count); });
}

template <class T>
void add_row(const void* row, float* sum, int64_t count) {
  const T* values = static_cast<const T*>(row);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    store_floats(sum + i, load_floats(sum + i) + load_floats(values + i));
  for (; i < count; ++i)
    sum[i] += mpoe::load(values[i]);
}

template <class T>
void round_row(const float* in, void* out, int64_t count) {
  store_row(in, static_cast<T*>(out), count);
}

template <class T>
constexpr GemmKernels table() {
  return {
      .unit = kUnitBytes / int64_t{sizeof(T)},
      .best_rows = UnitProduct<T>::kRows,
      .longest_sum = 384,
      .multiply_rows = multiply_rows<T, kPanel>,
      .multiply_half_panel = multiply_rows<T, kPanel / 2>,
      .multiply_columns = multiply_columns<T>,
      .multiply_dots = multiply_dots<T>,
      .store = store<T>,
      .finish = finish<T>,
      .store_units = store_units<T>,
      .pack = pack<T>,
      .pack_transposed = pack_transposed<T>,
      .pack_granules = pack_granules<T>,
      .transpose = transpose<T>,
      .activation_backward = activation_backward<T>,
      .add_row = add_row<T>,
      .round_row = round_row<T>,
  };
}

}  // namespace

const GemmKernels MPOE_GEMM[2] = {table<float>(), table<BFloat16>()};

}  // namespace mpoe
