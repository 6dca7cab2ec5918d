#define MPOE_ROWS kRowsGeneric
#include "cpu/routing_rows_body.h"
