#define MPOE_ROWS kRowsAvx512
#include "cpu/routing_rows_body.h"
