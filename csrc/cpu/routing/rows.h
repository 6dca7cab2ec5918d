// Loops over the elements of one row, for every element type. One table per instruction set.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace mpoe {

struct RowFunctions {
  // out = sum over k < count of gates[k] * (row slots[k] of rows), skipping negative slots; gates
  // null: all 1.
  void (*weighted_sum)(const void* rows,
                       const int64_t* slots,
                       const void* gates,
                       int64_t count,
                       void* out,
                       int64_t n);
  // out = gate * row
  void (*scale)(const void* row, const void* gate, void* out, int64_t n);
  // result = <a, b>
  void (*dot)(const void* a, const void* b, void* result, int64_t n);
  // out = row
  void (*widen)(const void* row, float* out, int64_t n);
};

// Indexed by Dtype.
extern const RowFunctions kRowsGeneric[4];
extern const RowFunctions kRowsAvx2[4];
extern const RowFunctions kRowsAvx512[4];

// Those of the instruction set in use.
const RowFunctions& row_functions(Dtype dtype);

}  // namespace mpoe
