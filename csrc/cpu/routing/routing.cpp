// The sort counts and then places the pairs of token and choice, in chunks of adjacent tokens that
// threads share. Pair t * K + k has a key: its expert, or E if it gets none. For example, two chunks
// of two tokens, K = 2, E = 2, where the last token is masked:
//
//   keys              0 1   1 0  |  1 0   2 2
//   counts of keys    2, 2, 0    |  1, 1, 2
//   first slots       0, 3, 6    |  2, 5, 6     key by key, chunk by chunk
//   slots             0 3   4 1  |  5 2   6 7
#include "cpu/routing/routing.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu_features.h"
#include "common/parallel.h"
#include "cpu/routing/rows.h"

namespace mpoe {

#define kRowsAvx512Bf16 kRowsAvx512  // has no instructions for rows
const RowFunctions& row_functions(Dtype dtype) {
  return MPOE_TABLE_IN_USE(kRows)[static_cast<int>(dtype)];
}

namespace {

// Fewest pairs that a thread sorts and fewest bytes that it moves: less is not worth waking a
// thread.
constexpr int64_t kPairsPerChunk = 1 << 14;
constexpr int64_t kBytesPerThread = 1 << 16;

int64_t rows_per_thread(int64_t bytes_per_row) {
  return std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_row));
}

int64_t gate_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : 4;
}

const void* at(const void* base, int64_t bytes) {
  return static_cast<const char*>(base) + bytes;
}
void* at(void* base, int64_t bytes) {
  return static_cast<char*>(base) + bytes;
}

// Replaces a count by the sum of those before it, to which it adds.
void sum_before(int64_t& count, int64_t& before) {
  const int64_t pairs = count;
  count = before;
  before += pairs;
}

// Marks pairs beyond the capacity with key E. First choices are served before second ones: counts
// run over [K, T]. each_chunk(visit) calls visit(chunk, first token, last token).
template <class EachChunk>
void drop_beyond_capacity(const Route& a,
                          int64_t chunks,
                          const EachChunk& each_chunk,
                          int32_t* keys) {
  // [K, chunks, E]: pairs, later the pairs before
  std::vector<int64_t> counts(a.top_k * chunks * a.experts);
  const auto counts_of = [&](int64_t k, int64_t chunk) {
    return &counts[(k * chunks + chunk) * a.experts];
  };
  const auto each_pair = [&](auto&& visit) {
    each_chunk([&](int64_t chunk, int64_t first, int64_t last) {
      for (int64_t k = 0; k < a.top_k; ++k)
        for (int64_t t = first; t < last; ++t) {
          int32_t& key = keys[t * a.top_k + k];
          if (key < a.experts)
            visit(key, counts_of(k, chunk)[key]);
        }
    });
  };
  each_pair([](int32_t&, int64_t& count) { ++count; });
  for (int64_t e = 0; e < a.experts; ++e) {
    int64_t before = 0;
    for (int64_t k = 0; k < a.top_k; ++k)
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        sum_before(counts_of(k, chunk)[e], before);
  }
  const int32_t dropped = static_cast<int32_t>(a.experts);
  each_pair([&](int32_t& key, int64_t& rank) {
    if (rank++ >= a.capacity)
      key = dropped;
  });
}

}  // namespace

int64_t first_outside(const int64_t* values, int64_t count, int64_t low, int64_t high) {
  bool fine = true;
  for (int64_t i = 0; i < count; ++i)
    fine &= values[i] >= low && values[i] <= high;
  if (fine)
    return -1;
  return std::find_if(values, values + count, [=](int64_t v) { return v < low || v > high; }) -
         values;
}

int64_t sort_pairs(const int64_t* index,
                   Span pairs,
                   int64_t experts,
                   int64_t filled,
                   int64_t* offsets,
                   int64_t* slots) {
  std::vector<int64_t> next(experts);
  for (int64_t s = pairs.first; s < pairs.last; ++s)
    if (index[s] >= 0)
      ++next[index[s]];
  for (int64_t e = 0; e < experts; ++e) {
    offsets[e] = filled;
    filled += next[e];
    next[e] = offsets[e];
  }
  offsets[experts] = filled;
  for (int64_t s = pairs.first; s < pairs.last; ++s)
    if (index[s] >= 0)
      slots[next[index[s]]++] = s;
  return filled;
}

void route(const Route& a) {
  const int64_t pairs = a.tokens * a.top_k;
  const int64_t chunk_tokens = std::max<int64_t>(1, kPairsPerChunk / a.top_k);
  const int64_t chunks = std::max<int64_t>(1, (a.tokens + chunk_tokens - 1) / chunk_tokens);
  const int64_t buckets = a.experts + 1;  // keys
  std::vector<int32_t> keys(pairs);
  // [chunks, E + 1]: pairs of the chunk, then its first slot, then its next one
  std::vector<int64_t> starts(chunks * buckets);
  const auto each_chunk = [&](auto&& visit) {
    parallel_for_each(chunks, 1, [&](int64_t chunk) {
      visit(chunk, chunk * chunk_tokens, std::min(a.tokens, (chunk + 1) * chunk_tokens));
    });
  };
  each_chunk([&](int64_t, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const bool routed = a.token_mask == nullptr || a.token_mask[t];
      for (int64_t p = t * a.top_k; p < (t + 1) * a.top_k; ++p)
        keys[p] = static_cast<int32_t>(routed ? a.index[p] : a.experts);
    }
  });
  if (a.capacity >= 0)
    drop_beyond_capacity(a, chunks, each_chunk, keys.data());
  each_chunk([&](int64_t chunk, int64_t first, int64_t last) {
    int64_t* counts = &starts[chunk * buckets];
    for (int64_t p = first * a.top_k; p < last * a.top_k; ++p)
      ++counts[keys[p]];
  });
  int64_t slot = 0;
  for (int64_t e = 0; e < buckets; ++e) {
    a.expert_offsets[e] = static_cast<int32_t>(slot);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      sum_before(starts[chunk * buckets + e], slot);
  }
  each_chunk([&](int64_t chunk, int64_t first, int64_t last) {
    int64_t* next = &starts[chunk * buckets];
    for (int64_t t = first; t < last; ++t)
      for (int64_t p = t * a.top_k; p < (t + 1) * a.top_k; ++p) {
        const int64_t target = next[keys[p]]++;
        a.token_of_slot[target] = t;
        a.slot_of_token[p] = keys[p] == a.experts ? -1 : target;
      }
  });
}

void dispatch(const Dispatch& a) {
  parallel_for_each(a.slots, rows_per_thread(2 * a.width), [&](int64_t s) {
    if (s < a.filled)
      std::memcpy(at(a.out, s * a.width), at(a.x, a.token_of_slot[s] * a.x_stride), a.width);
    else
      std::memset(at(a.out, s * a.width), 0, a.width);
  });
}

void combine(const Combine& a, const void* rows, void* out) {
  const RowFunctions& functions = row_functions(a.dtype);
  const int64_t width = a.features * size_of(a.dtype);
  const int64_t gates_width = a.top_k * gate_size(a.dtype);
  parallel_for_each(a.tokens, rows_per_thread((a.top_k + 1) * width), [&](int64_t t) {
    functions.weighted_sum(rows,
                           a.slot_of_token + t * a.top_k,
                           a.gates == nullptr ? nullptr : at(a.gates, t * gates_width),
                           a.top_k,
                           at(out, t * width),
                           a.features);
  });
}

void combine_backward(
    const Combine& a, const void* grad, const void* rows, void* drows, void* dgates) {
  const RowFunctions& functions = row_functions(a.dtype);
  const int64_t width = a.features * size_of(a.dtype);
  const int64_t gate = gate_size(a.dtype);
  if (drows != nullptr) {
    std::vector<unsigned char> filled(a.slots);
    for (int64_t p = 0; p < a.tokens * a.top_k; ++p)
      if (a.slot_of_token[p] >= 0)
        filled[a.slot_of_token[p]] = 1;
    parallel_for_each(a.slots, rows_per_thread(width), [&](int64_t s) {
      if (filled[s] == 0)
        std::memset(at(drows, s * width), 0, width);
    });
  }
  parallel_for(a.tokens, rows_per_thread(3 * a.top_k * width), [&](int64_t first, int64_t last) {
    for (int64_t p = first * a.top_k; p < last * a.top_k; ++p) {
      const int64_t slot = a.slot_of_token[p];
      const void* grad_row = at(grad, p / a.top_k * width);
      if (drows != nullptr && slot >= 0)
        functions.scale(grad_row, at(a.gates, p * gate), at(drows, slot * width), a.features);
      if (dgates == nullptr)
        continue;
      if (slot >= 0)
        functions.dot(at(rows, slot * width), grad_row, at(dgates, p * gate), a.features);
      else
        std::memset(at(dgates, p * gate), 0, gate);
    }
  });
}

}  // namespace mpoe
