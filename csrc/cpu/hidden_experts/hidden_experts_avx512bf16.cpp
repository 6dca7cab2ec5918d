#define MPOE_HIDDEN kHiddenAvx512Bf16
#include "cpu/hidden_experts/body.h"
