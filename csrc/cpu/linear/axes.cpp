#include "cpu/linear/axes.h"

namespace mpoe {

Permutation::Permutation(const AxisValues& sizes, const AxisMatrix& from, const AxisMatrix& to) {
  const AxisValues from_strides = from.strides(sizes), to_strides = to.strides(sizes);
  std::vector<Move> moves;
  for (const Axis axis : to.rows + to.columns) {
    const Move next{sizes[axis], from_strides[axis], to_strides[axis]};
    if (next.size == 1) continue;
    // Axes adjacent in both orders are merged.
    if (!moves.empty() && moves.back().from == next.size * next.from && moves.back().to == next.size * next.to)
      moves.back() = {moves.back().size * next.size, next.from, next.to};
    else
      moves.push_back(next);
  }
  if (!moves.empty()) {
    inner_ = moves.back();
    moves.pop_back();
  }
  const auto fastest = std::find_if(moves.begin(), moves.end(), [](const Move& move) { return move.from == 1; });
  if (inner_.to == 1 && fastest != moves.end()) {
    across_ = *fastest;
    moves.erase(fastest);
  }
  places_.push_back({0, 0});
  for (const Move& move : moves) {
    const auto before = std::move(places_);
    places_.clear();
    for (const auto& [source, target] : before)
      for (std::int64_t i = 0; i < move.size; ++i) places_.push_back({source + i * move.from, target + i * move.to});
  }
}

}  // namespace mpoe
