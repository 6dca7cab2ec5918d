#define MPOE_GEMM kGemmAvx512
#include "cpu/gemm/body.h"
