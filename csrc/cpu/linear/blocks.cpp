#include "cpu/linear/blocks.h"

namespace mpoe {

ColumnMap side_columns(const Side& side, Span c_range, Span l_range, std::int64_t panel) {
  const std::int64_t granules = ceil_divide(side.R, kGranule), height = l_range.last - l_range.first;
  ColumnMap map{};
  for (std::int64_t g = 0; g < kPanel / kGranule; ++g) {
    const std::int64_t q = panel * (kPanel / kGranule) + g;
    const std::int64_t c = c_range.first + q / (height * granules), l = l_range.first + q / granules % height;
    if (c >= c_range.last) continue;
    const std::int64_t r = q % granules * kGranule, offset = side.offset(l, c, r);
    map.offset[g] = offset;
    map.valid[g] = static_cast<std::int32_t>(
        std::clamp<std::int64_t>(std::min(side.R - r, side.features - offset), 0, kGranule));
  }
  return map;
}

UnitColumns::UnitColumns(std::int64_t unit, std::int64_t inner, std::int64_t inner_stride, std::int64_t columns)
    : per_panel(kPanel / kGranule / unit) {
  const std::int64_t granules = ceil_divide(columns, kGranule), count = ceil_divide(inner, unit) * granules;
  panels = ceil_divide(count, per_panel);
  for (std::int64_t p = 0; p < panels; ++p) {
    ColumnMap columns_of_panel{};
    for (std::int64_t s = 0; s < per_panel; ++s) {
      const std::int64_t q = std::min(p * per_panel + s, count - 1);  // past the end: the last one again
      const std::int64_t first = q / granules * unit, column = q % granules * kGranule;
      which.push_back(static_cast<std::int32_t>(q % granules));
      unit_offset.push_back(static_cast<std::int32_t>(q / granules * kPanel));
      for (std::int64_t i = 0; i < unit && first + i < inner; ++i) {
        columns_of_panel.offset[i * per_panel + s] = (first + i) * inner_stride + column;
        columns_of_panel.valid[i * per_panel + s] = static_cast<std::int32_t>(std::min(kGranule, columns - column));
      }
    }
    map.push_back(columns_of_panel);
  }
}

}  // namespace mpoe
