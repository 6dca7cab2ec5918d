#define MPOE_ROWS kRowsAvx512
#include "cpu/routing/rows_body.h"
