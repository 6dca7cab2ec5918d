#define MPOE_GEMM kGemmGeneric
#include "cpu/gemm_body.h"
