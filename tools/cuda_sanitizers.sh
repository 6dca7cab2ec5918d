#!/usr/bin/env bash
# The emulated CUDA kernels under the address, undefined-behaviour and thread sanitizers, on all four schedules. Needs a C++
# compiler for x86-64 with the sanitizers' libraries, and Python with torch and pybind11 for the long form.
#   tools/cuda_sanitizers.sh          the sweeps of csrc/emu, without torch: seconds, red on any report
#   tools/cuda_sanitizers.sh --all    then every emulated test again with the address sanitizer
set -euo pipefail
cd "$(dirname "$0")/.."
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 TSAN_OPTIONS=halt_on_error=1

lane() {
    local part program order copies
    for part in linear routing hidden; do
        program=$(python -c "import sys; sys.path.insert(0, 'tools'); import cuda_emulate
print(cuda_emulate.sweep('$part', '$1'))")
        for order in ascending descending; do
            for copies in lazy eager; do
                # Thread sanitizers of older compilers know no addresses as random as newer kernels choose.
                setarch -R "$program" $order $copies
            done
        done
    done
    echo "$1: passed"
}

lane address &
address=$!
lane thread
wait $address

if [ "${1:-}" = --all ]; then
    MPOE_EMULATED=$(python tools/cuda_emulate.py address)
    export MPOE_EMULATED
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        python -m pytest -q -p no:cacheprovider tests/cuda --ignore tests/cuda/test_emulator.py \
        --ignore tests/cuda/test_planted.py --ignore tests/cuda/test_public_ops.py
    echo "every emulated test with address: passed"
fi
