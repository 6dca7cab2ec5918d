// Rows of an MPO table under sanitizers, against loops in double precision, with 1 and 3 threads.
#include "check.h"
#include "cpu/embedding/embedding.h"

namespace mpoe {
namespace {

using check::Array;

struct Case {
  std::int64_t tokens, embedding_dim, iL, jL, a, iC, jC, b, iR, jR;
  bool few_ids;  // ids that occur often
};

// Both orders, with slices of right that fill less than half a panel, half, one and several.
const Case kCases[] = {
    {0, 4, 2, 2, 3, 2, 2, 3, 2, 2, false},         {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, false},
    {5, 380, 7, 12, 33, 3, 4, 17, 9, 8, false},    {900, 380, 7, 12, 33, 3, 4, 17, 9, 8, true},
    {60, 105, 5, 3, 70, 2, 5, 450, 4, 7, false},   {700, 280, 30, 1, 401, 2, 3, 35, 16, 95, false},
    {300, 64, 40, 8, 16, 1, 1, 20, 1, 8, true},    {150, 70, 1, 1, 5, 50, 7, 3, 6, 11, false},
    {1, 768, 6, 12, 20, 3, 4, 37, 7, 16, false},   {80, 765, 6, 12, 20, 3, 4, 37, 7, 16, true},
    {40, 1100, 6, 5, 20, 3, 14, 37, 7, 16, false}, {300, 150, 9, 2, 33, 2, 1, 41, 5, 75, true},
    {50, 250, 8, 2, 33, 2, 2, 40, 9, 64, false},
};

std::vector<double> truth_of(
    const Case& c, const std::vector<std::int64_t>& ids, const Array& l, const Array& m, const Array& r) {
  std::vector<double> out(c.tokens * c.embedding_dim);
  std::vector<double> half(c.jL * c.jC * c.b);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    const std::int64_t iR = ids[t] % c.iR, iC = ids[t] / c.iR % c.iC, iL = ids[t] / c.iR / c.iC;
    for (std::int64_t p = 0; p < c.jL * c.jC; ++p)
      for (std::int64_t v = 0; v < c.b; ++v) {
        double sum = 0;
        for (std::int64_t u = 0; u < c.a; ++u)
          sum += l.get((iL * c.jL + p / c.jC) * c.a + u) * m.get(((u * c.iC + iC) * c.jC + p % c.jC) * c.b + v);
        half[p * c.b + v] = sum;
      }
    for (std::int64_t f = 0; f < c.embedding_dim; ++f)
      for (std::int64_t v = 0; v < c.b; ++v)
        out[t * c.embedding_dim + f] += half[f / c.jR * c.b + v] * r.get((v * c.iR + iR) * c.jR + f % c.jR);
  }
  return out;
}

void check_case(const Case& c, Dtype dtype, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const Array left = Array::random(dtype, c.iL * c.jL * c.a, random, 1, 1);
  const Array central = Array::random(dtype, c.a * c.iC * c.jC * c.b, random, 1, 3);
  const Array right = Array::random(dtype, c.b * c.iR * c.jR, random, 1, 1);
  const std::int64_t rows = c.iL * c.iC * c.iR;
  std::vector<std::int64_t> ids;
  for (std::int64_t t = 0; t < c.tokens; ++t)
    ids.push_back(c.few_ids ? rows - 1 - random.below(rows) / 9 : random.below(rows));
  const std::vector<double> truth = truth_of(c, ids, left, central, right);
  Array before;
  for (const int threads : {1, 3}) {
    set_threads(threads);
    Array found(dtype, c.tokens * c.embedding_dim, 1);
    embedding(
        {.dtype = dtype, .tokens = c.tokens, .embedding_dim = c.embedding_dim, .iL = c.iL, .jL = c.jL, .a = c.a,
         .iC = c.iC, .jC = c.jC, .b = c.b, .iR = c.iR, .jR = c.jR, .ids = ids.data(), .left = left.data(),
         .central = central.data(), .right = right.data()},
        found.data());
    const std::string what = "case " + std::to_string(number) + ", " + check::name_of(dtype);
    if (threads == 1)
      check::require_close(found, truth, check::tolerance(dtype), what);
    else
      check::require(found.same_bits(before), what + ": other bits");
    before = std::move(found);
  }
}

}  // namespace
}  // namespace mpoe

int main() {
  if (!mpoe::check::isa_exists()) return 77;
  int number = 0;
  for (const auto& c : mpoe::kCases) {
    mpoe::check_case(c, mpoe::Dtype::kFloat32, number);
    mpoe::check_case(c, mpoe::Dtype::kBFloat16, number++);
  }
  return mpoe::check::finish("embedding");
}
