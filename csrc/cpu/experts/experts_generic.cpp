#define MPOE_EXPERTS kExpertsGeneric
#include "cpu/experts/body.h"
