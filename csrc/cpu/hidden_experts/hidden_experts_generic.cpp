#define MPOE_HIDDEN kHiddenGeneric
#include "cpu/hidden_experts/body.h"
