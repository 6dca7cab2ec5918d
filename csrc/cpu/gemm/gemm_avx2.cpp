#define MPOE_GEMM kGemmAvx2
#include "cpu/gemm/body.h"
