#define MPOE_ROWS kRowsAvx2
#include "cpu/routing/rows_body.h"
