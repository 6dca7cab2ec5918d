// The ops mpoe_emulated::, in one source: the headers of torch that each file of them includes take longest.
#include "cuda/embedding/bind.cpp"
#include "cuda/hidden_experts/bind.cpp"
#include "cuda/linear/bind.cpp"
#include "cuda/routing/bind.cpp"
