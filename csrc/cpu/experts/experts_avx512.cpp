#define MPOE_EXPERTS kExpertsAvx512
#include "cpu/experts/body.h"
