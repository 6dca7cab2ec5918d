#define MPOE_NEURONS kNeuronsGeneric
#include "cpu/neurons/body.h"
