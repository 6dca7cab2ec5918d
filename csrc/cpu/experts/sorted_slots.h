// Slots that have an expert, sorted by tile of tokens, expert and token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/experts/experts.h"
#include "cpu/routing/routing.h"

namespace mpoe {

// Whether a slot is the first or the last of its token.
constexpr uint8_t kFirst = 1, kLast = 2;

// What the bodies of each instruction set read.
struct SlotsView {
  int64_t tile_tokens, tiles;
  const int64_t* slots;    // t * K + k
  const int64_t* owners;   // t of each slot
  const uint8_t* marks;    // kFirst and kLast of each slot
  const int64_t* offsets;  // [tiles, E + 1]
  bool complete;           // every token has a slot
};

// A counting sort per tile.
class SortedSlots {
 public:
  SortedSlots(const Experts& in, int64_t tile_tokens)
      : experts_(in.experts),
        // At least one tile, even without tokens: its gradients are zero.
        tiles_(std::max<int64_t>(1, ceil_divide(in.tokens, tile_tokens))),
        slots_(in.tokens * in.top_k),
        offsets_(tiles_ * (in.experts + 1)) {
    int64_t filled = 0;
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t first = tile * tile_tokens * in.top_k;
      const int64_t last = std::min(in.tokens, (tile + 1) * tile_tokens) * in.top_k;
      int64_t* const offsets = offsets_.data() + tile * (in.experts + 1);
      filled = sort_pairs(in.index, {first, last}, in.experts, filled, offsets, slots_.data());
    }
    slots_.resize(filled);
    for (const int64_t slot : slots_)
      owners_.push_back(slot / in.top_k);
    for (int64_t e = 0; e < in.experts; ++e)
      if (has_slots(e))
        used_.push_back(e);
    mark(in.tokens);
    view_ = {tile_tokens,
             tiles_,
             slots_.data(),
             owners_.data(),
             marks_.data(),
             offsets_.data(),
             complete_};
  }
  SortedSlots(const SortedSlots&) = delete;

  const SlotsView& view() const { return view_; }
  int64_t count() const { return std::ssize(slots_); }
  // Of all tiles.
  const std::vector<int64_t>& used_experts() const { return used_; }
  bool has_slots(int64_t expert) const {
    for (int64_t tile = 0; tile < tiles_; ++tile)
      if (rows(expert, tile) > 0)
        return true;
    return false;
  }
  // Of one tile.
  int64_t rows(int64_t expert, int64_t tile = 0) const {
    const int64_t* const offsets = offsets_.data() + tile * (experts_ + 1);
    return offsets[expert + 1] - offsets[expert];
  }

 private:
  void mark(int64_t tokens) {
    std::vector<int64_t> latest(tokens, -1);  // position of a token's last slot
    for (int64_t p = 0; p < count(); ++p) {
      int64_t& last = latest[owners_[p]];
      marks_.push_back(last < 0 ? kFirst : 0);
      last = p;
    }
    for (const int64_t p : latest) {
      if (p < 0)
        complete_ = false;
      else
        marks_[p] |= kLast;
    }
  }

  const int64_t experts_, tiles_;
  std::vector<int64_t> slots_, owners_, offsets_, used_;
  std::vector<uint8_t> marks_;
  bool complete_ = true;
  SlotsView view_;
};

}  // namespace mpoe
