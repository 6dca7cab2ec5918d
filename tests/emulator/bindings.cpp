// The ops mpoe_emulated::, in one source: torch's headers, which each of these files includes, take
// longest.
#include "cuda/linear/bind.cpp"
#include "cuda/routing/bind.cpp"
