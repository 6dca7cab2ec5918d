#define MPOE_HIDDEN kHiddenAvx2
#include "cpu/hidden_experts_body.h"
