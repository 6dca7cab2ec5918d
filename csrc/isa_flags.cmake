# Compiler flags of files named *_<isa>.cpp. cpu_features.cpp tests for every extension that these switch on.
set(MPOE_FLAGS_avx2 -march=x86-64-v3)
set(MPOE_FLAGS_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
set(MPOE_FLAGS_avx512bf16 -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)
