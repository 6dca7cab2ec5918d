// Slots of (token, choice) pairs by expert, and work that threads share out among themselves.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/neurons/neurons.h"

namespace mpoe {

// The slots that have an expert, by expert and token.
struct SortedSlots {
  std::vector<std::int64_t> slots, owners;  // t * K + k, and t
  std::vector<std::int64_t> offsets;        // [E + 1]
  std::vector<std::int64_t> used;           // experts with slots

  explicit SortedSlots(const NeuronExperts& in) : offsets(in.experts + 1) {
    const std::int64_t pairs = in.tokens * in.top_k;
    for (std::int64_t s = 0; s < pairs; ++s)
      if (in.index[s] >= 0) ++offsets[in.index[s] + 1];
    for (std::int64_t e = 0; e < in.experts; ++e) {
      if (offsets[e + 1] > 0) used.push_back(e);
      offsets[e + 1] += offsets[e];
    }
    slots.resize(offsets[in.experts]);
    owners.resize(slots.size());
    std::vector<std::int64_t> next(offsets.begin(), offsets.end() - 1);
    for (std::int64_t s = 0; s < pairs; ++s)
      if (in.index[s] >= 0) {
        const std::int64_t place = next[in.index[s]]++;
        slots[place] = s;
        owners[place] = s / in.top_k;
      }
  }
  std::int64_t count() const { return static_cast<std::int64_t>(slots.size()); }
  std::int64_t rows(std::int64_t e) const { return offsets[e + 1] - offsets[e]; }
};

// make()(item) for every item, one make() per thread; a thread takes the next item when it is done with one.
template <class Make>
void share_out(std::int64_t items, const Make& make) {
  std::atomic<std::int64_t> next{0};
  parallel_for(0, std::min<std::int64_t>(num_threads(), items), 1, [&](std::int64_t, std::int64_t) {
    auto work = make();
    for (std::int64_t item = next++; item < items; item = next++) work(item);
  });
}

}  // namespace mpoe
