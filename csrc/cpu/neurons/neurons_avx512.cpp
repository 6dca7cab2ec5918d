#define MPOE_NEURONS kNeuronsAvx512
#include "cpu/neurons/body.h"
