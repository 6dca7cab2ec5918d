#define MPOE_HIDDEN kHiddenAvx2
#include "cpu/hidden_experts/body.h"
