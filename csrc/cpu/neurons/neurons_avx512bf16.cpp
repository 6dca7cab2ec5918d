#define MPOE_NEURONS kNeuronsAvx512Bf16
#include "cpu/neurons/body.h"
