#define MPOE_ROWS kRowsAvx2
#include "cpu/routing_rows_body.h"
