// The GEMM core under sanitizers: every function of the table, against double precision, at sizes with remainders.
#include <algorithm>

#include "check.h"
#include "cpu/gemm/gemm.h"
#include "truth.h"

namespace mpoe {
namespace {

using check::Array;
using check::require_close;
using Values = std::vector<double>;

constexpr Dtype kFloat = Dtype::kFloat32;

struct Bench {
  const GemmKernels& gemm;
  Dtype dtype;
  check::Random random;
  double allowed;

  explicit Bench(Dtype dtype_)
      : gemm(gemm_kernels(dtype_)), dtype(dtype_), random(7), allowed(check::tolerance(dtype_)) {}
  std::string what(const char* function, std::int64_t size) const {
    return std::string(function) + ", " + check::name_of(dtype) + ", size " + std::to_string(size);
  }
  Array filled(std::int64_t count, std::int64_t shift = 0) { return Array::random(dtype, count, random, 1, shift); }
};

// pack, pack_transposed, multiply_rows, multiply_half_panel, multiply_columns, store.
void check_product(Bench& b, std::int64_t rows, std::int64_t k, std::int64_t columns) {
  const GemmKernels& gemm = b.gemm;
  const std::int64_t units = ceil_divide(k, gemm.unit), wide = units * gemm.unit, stride = columns + 5;
  const std::int64_t panels = ceil_divide(columns, kPanel), panel = units * kPanel * gemm.unit;
  // Rows of A are padded to whole units with zeros; the last one ends where its memory ends.
  Array a(b.dtype, rows * wide);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t i = 0; i < wide; ++i) a.set(r * wide + i, i < k ? b.random.uniform() : 0);
  const Array right = b.filled(k == 0 ? 0 : (k - 1) * stride + columns, 1);
  Array turned(b.dtype, columns * k, 1), left_turned(b.dtype, k * rows, 1);
  Values truth(rows * columns), twice(rows * columns);
  for (std::int64_t i = 0; i < k; ++i) {
    for (std::int64_t c = 0; c < columns; ++c) turned.set(c * k + i, right.get(i * stride + c));
    for (std::int64_t r = 0; r < rows; ++r) left_turned.set(i * rows + r, a.get(r * wide + i));
  }
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      for (std::int64_t i = 0; i < k; ++i) truth[r * columns + c] += a.get(r * wide + i) * right.get(i * stride + c);
  for (std::size_t i = 0; i < truth.size(); ++i) twice[i] = 2 * truth[i];

  Array packed(b.dtype, panels * panel), packed_turned(b.dtype, panels * panel), left_panel(b.dtype, panel);
  gemm.pack(packed.data(), units, right.data(), stride, k, columns);
  gemm.pack_transposed(packed_turned.data(), units, turned.data(), k, k, columns);
  check::require(packed.same_bits(packed_turned), b.what("pack_transposed", k));
  gemm.pack(left_panel.data(), units, left_turned.data(), rows, k, rows);

  Array out(b.dtype, rows * columns, 1), by_halves(b.dtype, rows * columns, 1), by_columns(b.dtype, rows * columns, 1);
  for (std::int64_t p = 0; p < panels; ++p) {
    Array tile(kFloat, rows * kPanel);
    const char* b_panel = static_cast<const char*>(packed.data()) + p * panel * size_of(b.dtype);
    const std::int64_t left = std::min(kPanel, columns - p * kPanel);
    char* target = static_cast<char*>(out.data()) + p * kPanel * size_of(b.dtype);
    char* target_of_halves = static_cast<char*>(by_halves.data()) + p * kPanel * size_of(b.dtype);
    char* target_too = static_cast<char*>(by_columns.data()) + p * kPanel * size_of(b.dtype);
    for (const bool add : {false, true})
      gemm.multiply_rows(
          rows, units, a.data(), wide / gemm.unit, b_panel, static_cast<float*>(tile.data()), kPanel, add);
    gemm.store(static_cast<const float*>(tile.data()), rows, left, target, columns);
    for (const std::int64_t half : {kPanel / 2, std::int64_t{0}})
      for (const bool adds : {false, true})
        gemm.multiply_half_panel(
            rows, units, a.data(), wide / gemm.unit, b_panel + half * 4, static_cast<float*>(tile.data()) + half,
            kPanel, adds);
    gemm.store(static_cast<const float*>(tile.data()), rows, left, target_of_halves, columns);
    gemm.multiply_columns(rows, units, left_panel.data(), b_panel, static_cast<float*>(tile.data()), kPanel, false);
    gemm.store(static_cast<const float*>(tile.data()), rows, left, target_too, columns);
  }
  require_close(out, twice, b.allowed, b.what("multiply_rows", k));
  require_close(by_halves, twice, b.allowed, b.what("multiply_half_panel", k));
  require_close(by_columns, truth, b.allowed, b.what("multiply_columns", k));
}

// multiply_dots, and that a sum does not depend on what else is computed.
void check_dots(Bench& b, std::int64_t rows, std::int64_t k, std::int64_t columns) {
  const std::int64_t stride = k + 3, element = size_of(b.dtype);
  const Array left = b.filled((rows - 1) * stride + k, 1), right = b.filled((columns - 1) * stride + k, 1);
  Values truth(rows * columns);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      for (std::int64_t i = 0; i < k; ++i)
        truth[r * columns + c] += left.get(r * stride + i) * right.get(c * stride + i);
  Array all(kFloat, rows * columns), one(kFloat, 1);
  const auto dots = [&](std::int64_t first, std::int64_t count, std::int64_t column, std::int64_t width, Array& out) {
    b.gemm.multiply_dots(
        count, width, k, static_cast<const char*>(left.data()) + first * stride * element, stride,
        static_cast<const char*>(right.data()) + column * stride * element, stride, static_cast<float*>(out.data()),
        width);
  };
  dots(0, rows, 0, columns, all);
  require_close(all, truth, b.allowed, b.what("multiply_dots", k));
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) {
      dots(r, 1, c, 1, one);
      check::require(one.get(0) == all.get(r * columns + c), b.what("multiply_dots, one sum", k));
    }
}

// finish, with permuted and missing columns, bias and activation; pack_granules with the same map.
void check_finish(Bench& b, std::int64_t rows, Activation activation) {
  const ColumnMap map{.offset = {24, 0, 16, 9}, .valid = {5, 8, 0, 7}};
  const std::int64_t stride = 29;
  const Array tile = Array::random(kFloat, rows * kPanel, b.random), bias = Array::random(kFloat, kPanel, b.random);
  Array out(b.dtype, rows * stride, 1), saved(b.dtype, rows * stride, 1);
  Values y(rows * stride), z(rows * stride);
  for (std::int64_t i = 0; i < out.count(); ++i) out.set(i, 0), saved.set(i, 0);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t g = 0; g < kPanel / kGranule; ++g)
      for (std::int64_t c = 0; c < map.valid[g]; ++c) {
        const std::int64_t place = r * stride + map.offset[g] + c;
        z[place] = tile.get(r * kPanel + g * kGranule + c) + bias.get(g * kGranule + c);
        y[place] = truth::activate(activation, z[place]);
      }
  b.gemm.finish(
      static_cast<const float*>(tile.data()), rows, out.data(), nullptr, stride, map,
      {.bias = static_cast<const float*>(bias.data()), .activation = activation, .saved = saved.data()});
  require_close(out, y, b.allowed, b.what("finish", rows));
  require_close(saved, z, b.allowed, b.what("finish's saved", rows));

  const std::int64_t units = ceil_divide(rows, b.gemm.unit);
  Array panel(b.dtype, units * kPanel * b.gemm.unit);
  b.gemm.pack_granules(panel.data(), out.data(), stride, rows, map);
  Values expected(panel.count());
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t g = 0; g < kPanel / kGranule; ++g)
      for (std::int64_t c = 0; c < map.valid[g]; ++c)
        expected[(r / b.gemm.unit * kPanel + g * kGranule + c) * b.gemm.unit + r % b.gemm.unit] =
            out.get(r * stride + map.offset[g] + c);
  require_close(panel, expected, 0, b.what("pack_granules", rows));
}

void check_rows(Bench& b, std::int64_t rows, std::int64_t columns) {
  const Array in = b.filled(rows * columns, 1);
  Array out(b.dtype, rows * columns, 1);
  Values turned(rows * columns);
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) turned[c * rows + r] = in.get(r * columns + c);
  b.gemm.transpose(in.data(), columns, rows, columns, out.data(), rows);
  require_close(out, turned, 0, b.what("transpose", rows * columns));

  Array sum = Array::random(kFloat, columns, b.random), rounded(b.dtype, columns, 1);
  Values added = sum.values();
  for (std::int64_t c = 0; c < columns; ++c) added[c] += in.get(c);
  b.gemm.add_row(in.data(), static_cast<float*>(sum.data()), columns);
  require_close(sum, added, check::tolerance(kFloat), b.what("add_row", columns));
  b.gemm.round_row(static_cast<const float*>(sum.data()), rounded.data(), columns);
  require_close(rounded, sum.values(), b.allowed, b.what("round_row", columns));

  for (int kind = 0; kind <= static_cast<int>(Activation::kSilu); ++kind) {
    const Activation activation = static_cast<Activation>(kind);
    const Array grad = b.filled(rows * columns, 1), z = b.filled(rows * columns, 1);
    Array dz(b.dtype, rows * columns, 1);
    Values expected(rows * columns);
    for (std::int64_t i = 0; i < z.count(); ++i) expected[i] = grad.get(i) * truth::derivative(activation, z.get(i));
    const bool saves = activation != Activation::kNone;
    b.gemm.activation_backward(activation, grad.data(), saves ? z.data() : nullptr, dz.data(), rows * columns);
    require_close(dz, expected, b.allowed, b.what("activation_backward", kind));
  }
}

}  // namespace
}  // namespace mpoe

int main() {
  using namespace mpoe;
  if (!check::isa_exists()) return 77;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    Bench bench(dtype);
    for (std::int64_t rows = 1; rows <= bench.gemm.best_rows; ++rows)
      check_product(bench, rows, 3 + 4 * rows, 45 + rows);
    for (const std::int64_t k : {1, 2, 31, 32, 33}) check_product(bench, bench.gemm.best_rows, k, 30 + k);
    for (const std::int64_t k : {1, 31, 64, 13001})
      for (const std::int64_t rows : {1, 3, 4, 9}) check_dots(bench, rows, k, 11 - rows);
    for (int kind = 0; kind <= static_cast<int>(Activation::kSilu); ++kind)
      for (const std::int64_t rows : {1, 6, 11}) check_finish(bench, rows, static_cast<Activation>(kind));
    for (const std::int64_t columns : {1, 15, 16, 67}) check_rows(bench, 19, columns);
  }
  return check::finish("gemm");
}
