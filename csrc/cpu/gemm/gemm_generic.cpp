#define MPOE_GEMM kGemmGeneric
#include "cpu/gemm/body.h"
