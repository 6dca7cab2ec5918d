#define MPOE_GEMM kGemmAvx512
#include "cpu/gemm_body.h"
