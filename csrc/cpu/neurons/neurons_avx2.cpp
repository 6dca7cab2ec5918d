#define MPOE_NEURONS kNeuronsAvx2
#include "cpu/neurons/body.h"
