#define MPOE_GEMM kGemmAvx512Bf16
#include "cpu/gemm/body.h"
