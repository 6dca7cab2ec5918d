// What neurons.cpp computes between its products. Part of the bodies of each instruction set;
// nothing here may use inline functions that other files share.
#pragma once

#include <cstring>

#include "cpu/experts/kernels.h"
#include "cpu/experts/turn_back.h"

namespace mpoe {
namespace {

// Vectors of a row of which `columns` exist: zeros are read past its end, and nothing is written
// there.
struct Columns {
  int64_t columns;
  template <class T>
  Floats read(const T* row, int64_t c) const {
    if (c + kWidth <= columns)
      return load_floats(row + c);
    alignas(64) T part[kWidth] = {};
    std::memcpy(part, row + c, (columns - c) * sizeof(T));
    return load_floats(part);
  }
  template <class T>
  void write(T* row, int64_t c, Floats value) const {
    if (c + kWidth <= columns)
      return store_floats(row + c, value);
    alignas(64) T part[kWidth];
    store_floats(part, value);
    std::memcpy(row + c, part, (columns - c) * sizeof(T));
  }
};

template <class T, Activation kind>
void activate_tile(const NeuronTile& tile) {
  const Columns columns{tile.columns};
  const T* const bias = static_cast<const T*>(tile.bias);
  for (int64_t c = 0; c < tile.columns; c += kWidth) {
    const Floats shift = bias == nullptr ? Floats{} : columns.read(bias, c);
    for (int64_t r = 0; r < tile.rows; ++r) {
      Floats h = activate<kind>(columns.read(tile.z + r * kPanel, c) + shift);
      if (tile.value != nullptr)
        h *= columns.read(tile.value + r * kPanel, c);
      columns.write(static_cast<T*>(tile.h) + r * tile.h_stride, c, h * splat(tile.gates[r]));
    }
  }
}

template <class T, Activation kind>
void turn_back_tile(const NeuronTile& tile) {
  const Columns columns{tile.columns};
  const bool gated = tile.value != nullptr;
  const T* const bias = static_cast<const T*>(tile.bias);
  for (int64_t r = 0; r < tile.rows; ++r)
    tile.dgates[r] = 0;
  for (int64_t c = 0; c < tile.columns; c += kWidth) {
    const Floats shift = bias == nullptr ? Floats{} : columns.read(bias, c);
    Floats dbias = columns.read(tile.dbias, c);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const Floats gate = splat(tile.gates[r]);
      const Floats dh = columns.read(tile.dh + r * kPanel, c);
      const Floats z = columns.read(tile.z + r * kPanel, c) + shift;
      Floats value = {};
      if (gated)
        value = columns.read(tile.value + r * kPanel, c);
      const TurnedBack turned = turn_back<kind>(z, dh, gate, gated ? &value : nullptr);
      if (gated)
        columns.write(static_cast<T*>(tile.dvalue) + r * tile.stride, c, turned.dvalue);
      columns.write(static_cast<T*>(tile.h) + r * tile.h_stride, c, turned.h * gate);
      columns.write(static_cast<T*>(tile.dz) + r * tile.stride, c, turned.dz);
      tile.dgates[r] += sum_of(turned.h * dh);
      dbias += turned.dz;
    }
    columns.write(tile.dbias, c, dbias);
  }
}

void add_tile(const float* tile, int64_t rows, const int64_t* owners, float* sums, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const sum = sums + owners[r] * stride;
    for (int64_t c = 0; c < kPanel; c += kWidth)
      store_floats(sum + c, load_floats(sum + c) + load_floats(tile + r * kPanel + c));
  }
}

// sum [columns] += `count` rows of weights, each times its factor.
template <class T, int count>
void add_scaled(const T* factors, const T* weights, int64_t width, int64_t columns, float* sum) {
  Floats factor[count];
  for (int j = 0; j < count; ++j)
    factor[j] = splat_of(factors + j);
  int64_t c = 0;
#pragma GCC unroll 1
  for (; c + kWidth <= columns; c += kWidth) {
    Floats value = load_floats(sum + c);
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j)
      value = multiply_add(factor[j], load_floats(weights + j * width + c), value);
    store_floats(sum + c, value);
  }
  for (; c < columns; ++c)
    for (int j = 0; j < count; ++j)
      sum[c] += load(factors[j]) * load(weights[j * width + c]);
}

template <class T>
void add_products(const void* h,
                  int64_t h_stride,
                  int64_t rows,
                  const int64_t* owners,
                  const void* weights,
                  int64_t width,
                  int64_t neurons,
                  int64_t columns,
                  float* sums,
                  int64_t stride) {
  constexpr int kTogether = 8;
  const T* const factors = static_cast<const T*>(h);
  const T* const matrix = static_cast<const T*>(weights);
  const auto add = [&](auto count, int64_t j) {
    for (int64_t r = 0; r < rows; ++r)
      add_scaled<T, decltype(count)::value>(factors + r * h_stride + j,
                                            matrix + j * width,
                                            width,
                                            columns,
                                            sums + owners[r] * stride);
  };
  int64_t j = 0;
  for (; j + kTogether <= neurons; j += kTogether)
    add(std::integral_constant<int, kTogether>{}, j);
  for (; j < neurons; ++j)
    add(std::integral_constant<int, 1>{}, j);
}

template <class T>
void activate_as(Activation activation, const NeuronTile& tile) {
  with_activation(activation, [&](auto kind) { activate_tile<T, decltype(kind)::value>(tile); });
}
template <class T>
void turn_back_as(Activation activation, const NeuronTile& tile) {
  with_activation(activation, [&](auto kind) { turn_back_tile<T, decltype(kind)::value>(tile); });
}

}  // namespace
}  // namespace mpoe
