// The stable counting sort of (token, choice) pairs, by plain loops.
#pragma once

#include <cstdint>
#include <vector>

namespace mpoe::check {

using Index = std::vector<std::int64_t>;

struct Sorted {
  std::vector<std::int32_t> offsets;
  Index token_of_slot, slot_of_token;
  bool operator==(const Sorted&) const = default;
};

// First choices of all tokens are counted before second ones; slots keep the order of (token,
// choice).
inline Sorted sort_by_loops(std::int64_t tokens,
                            std::int64_t top_k,
                            std::int64_t experts,
                            std::int64_t capacity,
                            const Index& index,
                            const bool* mask) {
  Index expert(index);
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t k = 0; k < top_k; ++k)
      if (mask != nullptr && !mask[t])
        expert[t * top_k + k] = experts;
  Index count(experts);
  for (std::int64_t k = 0; k < top_k; ++k)
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::int64_t& e = expert[t * top_k + k];
      if (e < experts && capacity >= 0 && count[e] >= capacity)
        e = experts;
      if (e < experts)
        ++count[e];
    }
  Sorted sorted{.offsets = {}, .token_of_slot = {}, .slot_of_token = Index(index.size(), -1)};
  for (std::int64_t e = 0; e <= experts; ++e) {
    sorted.offsets.push_back(static_cast<std::int32_t>(sorted.token_of_slot.size()));
    for (std::size_t p = 0; p < expert.size(); ++p) {
      if (expert[p] != e)
        continue;
      if (e < experts)
        sorted.slot_of_token[p] = static_cast<std::int64_t>(sorted.token_of_slot.size());
      sorted.token_of_slot.push_back(static_cast<std::int64_t>(p) / top_k);
    }
  }
  return sorted;
}

}  // namespace mpoe::check
