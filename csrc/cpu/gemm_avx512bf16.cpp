#define MPOE_GEMM kGemmAvx512Bf16
#include "cpu/gemm_body.h"
