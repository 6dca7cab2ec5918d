// The sort, dispatch, combine and their gradients. See sweep.h.
#include "emulator/sweep.h"

#include "cuda/routing/routing.h"
#include "native/cpp/sorted.h"

namespace mpoe::cuda {

namespace {

using check::Array;
using check::Index;
using check::require;

struct Case {
  int tokens;
  int top_k;
  int experts;
  int capacity;
  bool masked;
};
// One launch for up to 1024 pairs, several for more; with and without a capacity.
const Case kCases[] = {
    {0, 1, 3, -1, false},
    {90, 2, 5, -1, true},
    {90, 2, 5, 20, true},
    {700, 2, 40, -1, true},
    {700, 2, 3, 300, false},
};

void check_rows(const Case& c, const check::Sorted& sorted, int columns, check::Random& random) {
  constexpr Dtype kDtype = Dtype::kBFloat16;
  const int slots = c.tokens * c.top_k;
  const std::string what = "rows of " + std::to_string(columns);
  const Array x = Array::random(kDtype, c.tokens * columns, random);
  const Array rows = Array::random(kDtype, slots * columns, random);
  const Array grad = Array::random(kDtype, c.tokens * columns, random);
  const Array gates = Array::random(Dtype::kFloat32, slots, random);
  std::vector<double> dispatched(slots * columns), mixed(c.tokens * columns),
      drows(slots * columns), dgates(slots);
  for (int s = 0; s < sorted.offsets.back(); ++s)
    for (int f = 0; f < columns; ++f)
      dispatched[s * columns + f] = x.get(sorted.token_of_slot[s] * columns + f);
  for (int p = 0; p < slots; ++p) {
    const int64_t s = sorted.slot_of_token[p];
    const int64_t t = p / c.top_k;
    for (int f = 0; s >= 0 && f < columns; ++f) {
      mixed[t * columns + f] += gates.get(p) * rows.get(s * columns + f);
      drows[s * columns + f] = gates.get(p) * grad.get(t * columns + f);
      dgates[p] += rows.get(s * columns + f) * grad.get(t * columns + f);
    }
  }
  const Array out(kDtype, slots * columns);
  const Array y(kDtype, c.tokens * columns);
  const Array dy(kDtype, slots * columns);
  const Array dweights(Dtype::kFloat32, slots);
  const auto* weights = static_cast<const float*>(gates.data());
  combine(kDtype,
          x.data(),
          columns,
          sorted.token_of_slot.data(),
          nullptr,
          &sorted.offsets.back(),
          out.data(),
          slots,
          1,
          columns,
          nullptr);
  combine(kDtype,
          rows.data(),
          columns,
          sorted.slot_of_token.data(),
          weights,
          nullptr,
          y.data(),
          c.tokens,
          c.top_k,
          columns,
          nullptr);
  combine_backward(kDtype,
                   grad.data(),
                   rows.data(),
                   sorted.token_of_slot.data(),
                   sorted.slot_of_token.data(),
                   weights,
                   dy.data(),
                   static_cast<float*>(dweights.data()),
                   slots,
                   c.top_k,
                   columns,
                   nullptr);
  const double allowed = check::tolerance(kDtype);
  check::require_close(out, dispatched, 0, what + ": dispatch");
  check::require_close(y, mixed, allowed, what + ": combine");
  check::require_close(dy, drows, allowed, what + ": drows");
  check::require_close(dweights, dgates, allowed, what + ": dgates");
}

void run(const Case& c) {
  check::Random random(1);
  const int64_t pairs = int64_t(c.tokens) * c.top_k;
  Index index(pairs);
  for (int64_t& e : index)
    e = random.below(c.experts);
  std::vector<char> kept(c.tokens);  // as bool
  for (char& keep : kept)
    keep = random.below(4) != 0;
  const bool* mask = c.masked ? reinterpret_cast<const bool*>(kept.data()) : nullptr;
  const check::Sorted expected =
      check::sort_by_loops(c.tokens, c.top_k, c.experts, c.capacity, index, mask);
  check::Sorted sorted{std::vector<int>(c.experts + 1, -7), Index(pairs, -7), Index(pairs, -7)};
  const Route arguments{index.data(),
                        mask,
                        c.tokens,
                        c.top_k,
                        c.experts,
                        c.capacity,
                        sorted.offsets.data(),
                        sorted.token_of_slot.data(),
                        sorted.slot_of_token.data()};
  std::vector<Array> taken;
  const Memory memory = [&](std::size_t bytes) {
    taken.emplace_back(Dtype::kFloat32, static_cast<int64_t>(bytes / 4 + 1));
    return taken.back().data();
  };
  route(arguments, memory, nullptr);
  require(sorted == expected, "route of " + std::to_string(c.tokens) + " tokens");
  for (const int columns : {7, 16}) {
    if (c.tokens < 100)
      check_rows(c, expected, columns, random);
  }
}

}  // namespace
}  // namespace mpoe::cuda

int main(int count, char** words) {
  return emu::sweep(count, words, [] {
    for (const auto& c : mpoe::cuda::kCases)
      mpoe::cuda::run(c);
  });
}
