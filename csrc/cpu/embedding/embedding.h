// out[t] = row ids[t] of the table that left, central and right represent, on raw pointers.
//
// Row (iL, iC, iR) is left[iL] [jL, a] times central[:, iC] [a, jC, b] times right[:, iR] [b, jR]. Every row is
// computed once, however often its id occurs, in the cheaper of two orders: left first, where all rows with the same iL
// and iC share left[iL] times central[:, iC], or right first, where all rows with the same iC and iR share central[:, iC]
// times right[:, iR]. The order does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace mpoe {

struct Embedding {
  Dtype dtype;  // kFloat32 or kBFloat16
  std::int64_t tokens, embedding_dim;
  std::int64_t iL, jL, a, iC, jC, b, iR, jR;
  const std::int64_t* ids;  // [T], each in 0..iL iC iR - 1
  const void* left;         // [iL, jL, a]
  const void* central;      // [a, iC, jC, b]
  const void* right;        // [b, iR, jR]
};
void embedding(const Embedding& in, void* out);  // [T, embedding_dim]

}  // namespace mpoe
