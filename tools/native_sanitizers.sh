#!/usr/bin/env bash
# The CPU kernels (csrc/common, csrc/cpu) without torch, under the address, undefined-behaviour and thread sanitizers,
# for the instruction sets of this machine. Needs a C++ compiler with the sanitizers' libraries, CMake and Ninja.
#   tools/native_sanitizers.sh [FOLDER [ISA...]]    builds in FOLDER (default build/sanitizers) and runs, for each named
#                                                   instruction set or "best"; fails on any report
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/sanitizers}
named=${*:2}
export ASAN_OPTIONS=detect_leaks=1:strict_init_order=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1

for sanitizers in address,undefined thread; do
    build=$folder/${sanitizers%%,*}
    cmake -S tests/native/cpp -B "$build" -G Ninja -DMPOE_SANITIZE=$sanitizers >/dev/null
    cmake --build "$build"
    # They share the code that splits work over threads: the thread sanitizer gets only the plainest and the best.
    isas="generic avx2 avx512 avx512bf16 amx"
    [ $sanitizers = thread ] && isas="generic best"
    for isa in ${named:-$isas}; do
        for program in routing linear experts; do
            # Thread sanitizers of older compilers cannot handle the address randomization of newer kernels.
            status=0
            [ $isa = best ] && unset MPOE_CPU_ISA || export MPOE_CPU_ISA=$isa
            setarch -R "$build/$program" || status=$?
            if [ "$status" = 77 ]; then
                echo "$program, $isa: not on this machine"
            elif [ "$status" != 0 ]; then
                echo "$program with $sanitizers, $isa: failed with status $status" >&2
                exit 1
            fi
        done
    done
    echo "$sanitizers: passed"
done
