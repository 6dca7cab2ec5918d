// The ops mpoe_emulated::, in one source: the headers of torch that each file of them includes take longest.
#include "cuda/bind_embedding.cpp"
#include "cuda/bind_hidden.cpp"
#include "cuda/bind_linear.cpp"
#include "cuda/bind_routing.cpp"
