// multiply_rows and multiply_columns of gemm.h for bfloat16 and up to 32 rows, with AMX. Only if active_isa() is kAmx.
#pragma once

#include <cstdint>

namespace mpoe {

void amx_multiply_rows(
    std::int64_t rows, std::int64_t units, const void* a, std::int64_t a_stride, const void* panel, float* tile,
    std::int64_t tile_stride, bool accumulate);
void amx_multiply_columns(
    std::int64_t rows, std::int64_t units, const void* a, const void* panel, float* tile, std::int64_t tile_stride,
    bool accumulate);

}  // namespace mpoe
