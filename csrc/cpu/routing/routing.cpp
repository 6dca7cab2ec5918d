#include "cpu/routing/routing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
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
constexpr std::int64_t kPairsPerChunk = 1 << 14;
constexpr std::int64_t kBytesPerThread = 1 << 16;

std::int64_t rows_per_thread(std::int64_t bytes_per_row) {
  return std::max<std::int64_t>(1, kBytesPerThread / std::max<std::int64_t>(1, bytes_per_row));
}

std::int64_t gate_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : 4;
}

const void* at(const void* base, std::int64_t bytes) {
  return static_cast<const char*>(base) + bytes;
}
void* at(void* base, std::int64_t bytes) {
  return static_cast<char*>(base) + bytes;
}

// Marks pairs beyond the capacity with key E. First choices are served before second ones: counts
// run over [K, T].
void drop_beyond_capacity(const Route& a,
                          std::int64_t chunks,
                          std::int64_t chunk_tokens,
                          std::int32_t* keys) {
  std::vector<std::int64_t> counts(a.top_k * chunks *
                                   a.experts);  // [K, chunks, E]: pairs, later the pairs before
  const auto counts_of = [&](std::int64_t k, std::int64_t chunk) {
    return &counts[(k * chunks + chunk) * a.experts];
  };
  const auto each_chunk = [&](auto&& visit) {
    parallel_for(0, chunks, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t chunk = first; chunk < last; ++chunk) {
        const std::int64_t stop = std::min(a.tokens, (chunk + 1) * chunk_tokens);
        for (std::int64_t k = 0; k < a.top_k; ++k)
          for (std::int64_t t = chunk * chunk_tokens; t < stop; ++t) {
            std::int32_t& key = keys[t * a.top_k + k];
            if (key < a.experts)
              visit(key, counts_of(k, chunk)[key]);
          }
      }
    });
  };
  each_chunk([](std::int32_t&, std::int64_t& count) { ++count; });
  for (std::int64_t e = 0; e < a.experts; ++e) {
    std::int64_t before = 0;
    for (std::int64_t k = 0; k < a.top_k; ++k)
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        std::int64_t& count = counts_of(k, chunk)[e];
        const std::int64_t own = count;
        count = before;
        before += own;
      }
  }
  const std::int32_t dropped = static_cast<std::int32_t>(a.experts);
  each_chunk([&](std::int32_t& key, std::int64_t& rank) {
    if (rank++ >= a.capacity)
      key = dropped;
  });
}

}  // namespace

std::int64_t first_outside(const std::int64_t* values,
                           std::int64_t count,
                           std::int64_t low,
                           std::int64_t high) {
  bool fine = true;
  for (std::int64_t i = 0; i < count; ++i)
    fine &= values[i] >= low && values[i] <= high;
  if (fine)
    return -1;
  return std::find_if(values, values + count, [=](std::int64_t v) { return v < low || v > high; }) -
         values;
}

std::int64_t sort_pairs(const std::int64_t* index,
                        Span pairs,
                        std::int64_t experts,
                        std::int64_t filled,
                        std::int64_t* offsets,
                        std::int64_t* slots) {
  std::vector<std::int64_t> next(experts);
  for (std::int64_t s = pairs.first; s < pairs.last; ++s)
    if (index[s] >= 0)
      ++next[index[s]];
  for (std::int64_t e = 0; e < experts; ++e) {
    offsets[e] = filled;
    filled += next[e];
    next[e] = offsets[e];
  }
  offsets[experts] = filled;
  for (std::int64_t s = pairs.first; s < pairs.last; ++s)
    if (index[s] >= 0)
      slots[next[index[s]]++] = s;
  return filled;
}

void route(const Route& a) {
  const std::int64_t pairs = a.tokens * a.top_k;
  const std::int64_t chunk_tokens = std::max<std::int64_t>(1, kPairsPerChunk / a.top_k);
  const std::int64_t chunks =
      std::max<std::int64_t>(1, (a.tokens + chunk_tokens - 1) / chunk_tokens);
  const std::int64_t buckets = a.experts + 1;  // the last one holds masked and dropped pairs
  std::vector<std::int32_t> keys(pairs);
  std::vector<std::int64_t> starts(
      chunks * buckets);  // [chunks, E + 1]: pairs of the chunk, later its next slot
  const auto each_chunk = [&](auto&& visit) {
    parallel_for(0, chunks, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t chunk = first; chunk < last; ++chunk)
        visit(chunk, chunk * chunk_tokens, std::min(a.tokens, (chunk + 1) * chunk_tokens));
    });
  };
  each_chunk([&](std::int64_t, std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) {
      const bool routed = a.token_mask == nullptr || a.token_mask[t];
      for (std::int64_t p = t * a.top_k; p < (t + 1) * a.top_k; ++p)
        keys[p] = static_cast<std::int32_t>(routed ? a.index[p] : a.experts);
    }
  });
  if (a.capacity >= 0)
    drop_beyond_capacity(a, chunks, chunk_tokens, keys.data());
  each_chunk([&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
    std::int64_t* counts = &starts[chunk * buckets];
    for (std::int64_t p = first * a.top_k; p < last * a.top_k; ++p)
      ++counts[keys[p]];
  });
  std::int64_t slot = 0;
  for (std::int64_t e = 0; e < buckets; ++e) {
    a.expert_offsets[e] = static_cast<std::int32_t>(slot);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t own = starts[chunk * buckets + e];
      starts[chunk * buckets + e] = slot;
      slot += own;
    }
  }
  each_chunk([&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
    std::int64_t* next = &starts[chunk * buckets];
    for (std::int64_t t = first; t < last; ++t)
      for (std::int64_t p = t * a.top_k; p < (t + 1) * a.top_k; ++p) {
        const std::int64_t target = next[keys[p]]++;
        a.token_of_slot[target] = t;
        a.slot_of_token[p] = keys[p] == a.experts ? -1 : target;
      }
  });
}

void dispatch(const Dispatch& a) {
  parallel_for(
      0, a.slots, rows_per_thread(2 * a.width), [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t s = first; s < last; ++s) {
          if (s < a.filled)
            std::memcpy(at(a.out, s * a.width), at(a.x, a.token_of_slot[s] * a.x_stride), a.width);
          else
            std::memset(at(a.out, s * a.width), 0, a.width);
        }
      });
}

void combine(const Combine& a, const void* rows, void* out) {
  const RowFunctions& functions = row_functions(a.dtype);
  const std::int64_t width = a.features * size_of(a.dtype);
  const std::int64_t gates_width = a.top_k * gate_size(a.dtype);
  parallel_for(0,
               a.tokens,
               rows_per_thread((a.top_k + 1) * width),
               [&](std::int64_t first, std::int64_t last) {
                 for (std::int64_t t = first; t < last; ++t)
                   functions.weighted_sum(
                       rows,
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
  const std::int64_t width = a.features * size_of(a.dtype);
  const std::int64_t gate = gate_size(a.dtype);
  if (drows != nullptr) {
    std::vector<unsigned char> filled(a.slots);
    for (std::int64_t p = 0; p < a.tokens * a.top_k; ++p)
      if (a.slot_of_token[p] >= 0)
        filled[a.slot_of_token[p]] = 1;
    parallel_for(0, a.slots, rows_per_thread(width), [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t s = first; s < last; ++s)
        if (filled[s] == 0)
          std::memset(at(drows, s * width), 0, width);
    });
  }
  parallel_for(
      0,
      a.tokens,
      rows_per_thread(3 * a.top_k * width),
      [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t p = first * a.top_k; p < last * a.top_k; ++p) {
          const std::int64_t slot = a.slot_of_token[p];
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
