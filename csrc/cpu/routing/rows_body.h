// Bodies of rows.h. Included by one file per instruction set, which defines MPOE_ROWS, the name of its table.
#include "cpu/gemm/vector.h"
#include "cpu/routing/rows.h"

namespace mpoe {
namespace {

// Elements summed at a time.
constexpr std::int64_t kBlock = 256;
// Independent partial sums of a dot product: they fix its order of summation, the same on every machine.
constexpr std::int64_t kLanes = 64;

template <class T>
[[gnu::always_inline]] inline void weighted_sum_block(
    const T* rows, const std::int64_t* slots, const typename Accumulator<T>::type* gates, std::int64_t count, T* out,
    std::int64_t stride, std::int64_t length) {
  using A = typename Accumulator<T>::type;
  A sum[kBlock];
  for (std::int64_t i = 0; i < length; ++i) sum[i] = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    if (slots[k] < 0) continue;
    const T* row = rows + slots[k] * stride;
    const A gate = gates == nullptr ? A(1) : gates[k];
    for (std::int64_t i = 0; i < length; ++i) sum[i] += gate * load(row[i]);
  }
  for (std::int64_t i = 0; i < length; ++i) store(out[i], sum[i]);
}

template <class T>
void weighted_sum(
    const void* rows, const std::int64_t* slots, const void* gates, std::int64_t count, void* out, std::int64_t n) {
  using A = typename Accumulator<T>::type;
  const T* source = static_cast<const T*>(rows);
  const A* gate = static_cast<const A*>(gates);
  T* target = static_cast<T*>(out);
  std::int64_t begin = 0;
  for (; begin + kBlock <= n; begin += kBlock)  // the known length keeps the sums in registers
    weighted_sum_block(source + begin, slots, gate, count, target + begin, n, kBlock);
  if (begin < n) weighted_sum_block(source + begin, slots, gate, count, target + begin, n, n - begin);
}

template <class T>
void scale(const void* row, const void* gate, void* out, std::int64_t n) {
  using A = typename Accumulator<T>::type;
  const A factor = *static_cast<const A*>(gate);
  const T* source = static_cast<const T*>(row);
  T* target = static_cast<T*>(out);
  for (std::int64_t i = 0; i < n; ++i) store(target[i], factor * load(source[i]));
}

template <class T>
void dot(const void* a, const void* b, void* result, std::int64_t n) {
  using A = typename Accumulator<T>::type;
  const T* left = static_cast<const T*>(a);
  const T* right = static_cast<const T*>(b);
  A partial[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) partial[i] = 0;
  std::int64_t begin = 0;
  for (; begin + kLanes <= n; begin += kLanes)
    for (std::int64_t i = 0; i < kLanes; ++i) partial[i] += load(left[begin + i]) * load(right[begin + i]);
  for (std::int64_t i = 0; begin + i < n; ++i) partial[i] += load(left[begin + i]) * load(right[begin + i]);
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2)
    for (std::int64_t i = 0; i < width; ++i) partial[i] += partial[i + width];
  *static_cast<A*>(result) = partial[0];
}

// The sum of `dot`'s lanes, in the same order.
inline float sum_of_lanes(Floats (&partial)[kLanes / kWidth]) {
  for (std::int64_t count = kLanes / kWidth / 2; count > 0; count /= 2)
    for (std::int64_t i = 0; i < count; ++i) partial[i] += partial[i + count];
  return sum_of(partial[0]);
}

// `count` dot products at once: each vector of `row` is loaded once for all of them.
template <int count>
inline void dots_of(const float* row, const float* others, std::int64_t n, float* out) {
  Floats partial[count][kLanes / kWidth] = {};
  std::int64_t begin = 0;
  for (; begin + kLanes <= n; begin += kLanes)
#pragma GCC unroll 16
    for (std::int64_t v = 0; v < kLanes / kWidth; ++v) {
      const std::int64_t i = begin + v * kWidth;
      const Floats left = load_floats(row + i);
#pragma GCC unroll 4
      for (int c = 0; c < count; ++c) partial[c][v] = multiply_add(left, load_floats(others + c * n + i), partial[c][v]);
    }
  if (begin < n) {
    float rest[2][kLanes];
    const auto fill = [&](float* to, const float* from) {
      for (std::int64_t i = 0; i < kLanes; ++i) to[i] = begin + i < n ? from[begin + i] : 0.0f;
    };
    fill(rest[0], row);
    for (int c = 0; c < count; ++c) {
      fill(rest[1], others + c * n);
      for (std::int64_t v = 0; v < kLanes / kWidth; ++v)
        partial[c][v] =
            multiply_add(load_floats(rest[0] + v * kWidth), load_floats(rest[1] + v * kWidth), partial[c][v]);
    }
  }
  for (int c = 0; c < count; ++c) out[c] = sum_of_lanes(partial[c]);
}

void dots(const float* row, const float* others, std::int64_t count, std::int64_t n, float* out) {
  constexpr int kTogether = kWidth == 16 ? 4 : 1;  // as many as there are registers for
  std::int64_t e = 0;
  for (; e + kTogether <= count; e += kTogether) dots_of<kTogether>(row, others + e * n, n, out + e);
  for (; e < count; ++e) dots_of<1>(row, others + e * n, n, out + e);
}

template <class T>
void widen(const void* row, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(load(static_cast<const T*>(row)[i]));
}

}  // namespace

const RowFunctions MPOE_ROWS[4] = {
    {weighted_sum<float>, scale<float>, dot<float>, widen<float>, dots},
    {weighted_sum<double>, scale<double>, dot<double>, widen<double>, nullptr},
    {weighted_sum<BFloat16>, scale<BFloat16>, dot<BFloat16>, widen<BFloat16>, nullptr},
    {weighted_sum<Float16>, scale<Float16>, dot<Float16>, widen<Float16>, nullptr},
};

}  // namespace mpoe
