#define MPOE_HIDDEN kHiddenAvx512
#include "cpu/hidden_experts/body.h"
