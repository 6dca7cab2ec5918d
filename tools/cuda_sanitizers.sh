#!/usr/bin/env bash
# The emulated CUDA kernels under the address, undefined-behaviour and thread sanitizers, on four schedules. Needs a C++
# compiler for x86-64 with the sanitizers' libraries, and Python with torch for the long form.
#   tools/cuda_sanitizers.sh          the sweeps of tests/emulator, without torch: seconds, fails on any report
#   tools/cuda_sanitizers.sh --all    then every emulated test again with the address sanitizer
set -euo pipefail
cd "$(dirname "$0")/.."
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 TSAN_OPTIONS=halt_on_error=1

all=${1:-}
lane() {
    local part program schedule schedules="ascending-lazy ascending-eager descending-lazy descending-eager"
    # The thread sanitizer takes longest: each order and each kind of copies once, all combinations with --all.
    [ "$1-$all" = thread- ] && schedules="ascending-lazy descending-eager"
    for part in linear routing experts; do
        program=$(python -c "import sys; sys.path.insert(0, 'tools'); import cuda_emulate
print(cuda_emulate.sweep('$part', '$1'))")
        for schedule in $schedules; do
            # Thread sanitizers of older compilers cannot handle the address randomization of newer kernels.
            setarch -R "$program" "${schedule%-*}" "${schedule#*-}"
        done
    done
    echo "$1: passed"
}

lane address &
address=$!
lane thread
wait $address

if [ "$all" = --all ]; then
    MPOE_EMULATED=$(python tools/cuda_emulate.py address)
    export MPOE_EMULATED
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        python -m pytest -q -p no:cacheprovider tests/cuda --ignore tests/cuda/test_emulator.py \
        --ignore tests/cuda/test_planted.py --ignore tests/cuda/test_public_ops.py
    echo "every emulated test with address: passed"
fi
