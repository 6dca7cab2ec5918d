// Bodies of rows.h. Included by one file per instruction set, which defines MPOE_ROWS, the name of
// its table.
#include "cpu/routing/rows.h"

namespace mpoe {
namespace {

// Elements summed at a time.
constexpr int64_t kBlock = 256;
// Independent partial sums of a dot product: they fix its order of summation, the same on every
// machine.
constexpr int64_t kLanes = 64;

template <class T>
[[gnu::always_inline]] inline void weighted_sum_block(const T* rows,
                                                      const int64_t* slots,
                                                      const typename Accumulator<T>::type* gates,
                                                      int64_t count,
                                                      T* out,
                                                      int64_t stride,
                                                      int64_t length) {
  using A = typename Accumulator<T>::type;
  A sum[kBlock];
  for (int64_t i = 0; i < length; ++i)
    sum[i] = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (slots[k] < 0)
      continue;
    const T* row = rows + slots[k] * stride;
    const A gate = gates == nullptr ? A(1) : gates[k];
    for (int64_t i = 0; i < length; ++i)
      sum[i] += gate * load(row[i]);
  }
  for (int64_t i = 0; i < length; ++i)
    store(out[i], sum[i]);
}

template <class T>
void weighted_sum(const void* rows,
                  const int64_t* slots,
                  const void* gates,
                  int64_t count,
                  void* out,
                  int64_t n) {
  using A = typename Accumulator<T>::type;
  const T* source = static_cast<const T*>(rows);
  const A* gate = static_cast<const A*>(gates);
  T* target = static_cast<T*>(out);
  int64_t begin = 0;
  for (; begin + kBlock <= n; begin += kBlock)  // the known length keeps the sums in registers
    weighted_sum_block(source + begin, slots, gate, count, target + begin, n, kBlock);
  if (begin < n)
    weighted_sum_block(source + begin, slots, gate, count, target + begin, n, n - begin);
}

template <class T>
void scale(const void* row, const void* gate, void* out, int64_t n) {
  using A = typename Accumulator<T>::type;
  const A factor = *static_cast<const A*>(gate);
  const T* source = static_cast<const T*>(row);
  T* target = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i)
    store(target[i], factor * load(source[i]));
}

template <class T>
void dot(const void* a, const void* b, void* result, int64_t n) {
  using A = typename Accumulator<T>::type;
  const T* left = static_cast<const T*>(a);
  const T* right = static_cast<const T*>(b);
  A partial[kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    partial[i] = 0;
  int64_t begin = 0;
  for (; begin + kLanes <= n; begin += kLanes)
    for (int64_t i = 0; i < kLanes; ++i)
      partial[i] += load(left[begin + i]) * load(right[begin + i]);
  for (int64_t i = 0; begin + i < n; ++i)
    partial[i] += load(left[begin + i]) * load(right[begin + i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i)
      partial[i] += partial[i + width];
  *static_cast<A*>(result) = partial[0];
}

template <class T>
void widen(const void* row, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<float>(load(static_cast<const T*>(row)[i]));
}

}  // namespace

const RowFunctions MPOE_ROWS[4] = {
    {weighted_sum<float>, scale<float>, dot<float>, widen<float>},
    {weighted_sum<double>, scale<double>, dot<double>, widen<double>},
    {weighted_sum<BFloat16>, scale<BFloat16>, dot<BFloat16>, widen<BFloat16>},
    {weighted_sum<Float16>, scale<Float16>, dot<Float16>, widen<Float16>},
};

}  // namespace mpoe
