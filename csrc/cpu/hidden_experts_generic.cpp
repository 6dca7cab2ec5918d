#define MPOE_HIDDEN kHiddenGeneric
#include "cpu/hidden_experts_body.h"
