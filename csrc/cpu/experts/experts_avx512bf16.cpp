#define MPOE_EXPERTS kExpertsAvx512Bf16
#include "cpu/experts/body.h"
