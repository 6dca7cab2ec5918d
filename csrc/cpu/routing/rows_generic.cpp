#define MPOE_ROWS kRowsGeneric
#include "cpu/routing/rows_body.h"
