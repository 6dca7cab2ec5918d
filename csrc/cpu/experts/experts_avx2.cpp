#define MPOE_EXPERTS kExpertsAvx2
#include "cpu/experts/body.h"
