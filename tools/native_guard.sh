#!/usr/bin/env bash
# Runs tests with every CPU tensor and kernel buffer at the end of its pages (tests/native/cpp/guard_pages.cpp): a native
# kernel that reads or writes beyond one dies with SIGSEGV. Needs the native kernels and a C++ compiler, on Linux.
#   tools/native_guard.sh                  tests/native and tests/kernels except for the eager backend
#   tools/native_guard.sh ARGUMENTS...     these pytest arguments
#   MPOE_GUARD_LIBRARY=FILE                where the allocator is built (default build/guard_pages.so)
set -euo pipefail
cd "$(dirname "$0")/.."
library=$(realpath -m "${MPOE_GUARD_LIBRARY:-build/guard_pages.so}")
mkdir -p "$(dirname "$library")"
"${CXX:-c++}" -std=c++20 -O2 -Wall -Wextra -shared -fPIC -o "$library" tests/native/cpp/guard_pages.cpp -ldl
[ $# -gt 0 ] || set -- tests/native tests/kernels -k "not eager"
# Waiting threads would spin, which takes most of the time of these small cases.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# A process may have 65,530 memory mappings, and every tensor takes one: oneDNN must not cache a thousand products.
ONEDNN_PRIMITIVE_CACHE_CAPACITY=${ONEDNN_PRIMITIVE_CACHE_CAPACITY:-16} LD_PRELOAD=$library exec "${PYTHON:-python}" -X faulthandler -m pytest -q -p no:xdist "$@"
