#!/usr/bin/env bash
# One visit to a GPU of 30 minutes: correctness, stress, times, whole layers, memory, profiles, graphs last.
#   bench/gpu.sh --build           beforehand, without a GPU: the CUDA kernels for an H100 (sm_90a)
#   bench/gpu.sh                   the visit; results in bench/results/visit-<date>, and in one archive next to it
#   bench/gpu.sh --minutes 10      what does not fit is left for the next call, which continues where this one stopped
#   bench/gpu.sh --plan            the commands of its parts, and how long each may take
#   bench/gpu.sh --device cpu      the same parts on tiny sizes and no GPU, to try the script; tests are listed, not run
# A kernel whose result was wrong is left out of the parts that follow, and the status is 1. A missing program, or a part
# out of time, is a line in the report.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda minutes=30 plan='' build='' out=''
while [ $# -gt 0 ]; do
    case $1 in
        --device | --minutes | --out) declare "${1#--}=${2:?}" && shift 2 ;;
        --plan | --build) declare "${1#--}=yes" && shift ;;
        *) sed -n '2,9s/^# \{0,1\}//p' bench/gpu.sh >&2 && exit 64 ;;
    esac
done
python=${PYTHON:-python3}
out=${out:-bench/results/visit-$(date +%F)}
end=$((SECONDS + 60 * minutes))
export PYTHONPATH="$PWD:$PWD/bench:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$build" ]; then
    exec env MPOE_BUILD=cuda TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0a}" "$python" setup.py -q build_ext --inplace
fi
wrong=$out/wrong
[ "${out#/}" != "$out" ] || wrong=$PWD/$wrong
export MPOE_TEST_DEVICE=$device MPOE_TEST_WRONG=$wrong
tiny='' graph=graph kernels=triton
if [ "$device" = cpu ]; then # plain PyTorch in place of the kernels
    export OMP_NUM_THREADS=1
    tiny="--scale tiny --threads 1" graph=forward kernels=eager
else
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton_cache} MPOE_TEST_REQUIRED="eager triton"
    # Built beforehand: a visit without it is one of Triton's kernels alone.
    [ ! -e mpoe_kernels/_C_cuda.abi3.so ] || MPOE_TEST_REQUIRED+=" cuda" kernels=triton,cuda
fi

report() { printf '| %s | %s | %s | %s |\n' "$@" | tee -a "$out/visit.md"; }

part() { # NAME SECONDS COMMAND...: once, for so long at most
    local name=$1 limit=$2 began=$SECONDS result status last
    shift 2
    if [ -n "$plan" ]; then
        printf '%s (%s s): %s\n' "$name" "$limit" "$*"
        return
    fi
    grep -qx "$name" "$out/done" 2>/dev/null && return
    [ $((end - SECONDS)) -ge "$limit" ] || limit=$((end - SECONDS))
    if [ "$limit" -lt 5 ]; then
        report "$name" "no time was left" 0 ''
        return
    fi
    timeout -k 5 "$limit" "$@" 2>&1 | sed -E "s#$PWD/##g; s#/[^ ]*/(site|dist)-packages/##g" | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) result=passed && echo "$name" >>"$out/done" ;;
        124 | 137) result="out of time" ;;
        127) result="not here" ;;
        *) result=failed ;;
    esac
    # Of a test that failed for another reason (a missing package), there is a line alone.
    grep -qE "^E +(AssertionError|assert )|wrong or failed: .*wrong result|ERROR SUMMARY: [1-9]" "$out/$name.log" && result=WRONG
    last=$(grep -v '^[ =]*$' "$out/$name.log" | tail -n 1 | tr '|' '/' | cut -c 1-160)
    report "$name" "$result" $((SECONDS - began)) "$last"
    tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
}

bench() { # NAME SECONDS OPTIONS...
    part "$1" "$2" "$python" -m mpoe bench --device "$device" --overwrite --out "$out/$1" "${@:3}" $tiny
}

tests() { # NAME SECONDS TESTS [CHECKER...]; without a checker, several processes compile the kernels
    local how=''
    [ "$device" = cpu ] && how=--collect-only && set -- "${@:1:3}" # the default tests run them
    [ $# = 3 ] && [ "$device" = cuda ] && "$python" -c "import xdist" 2>/dev/null && how="-n 8"
    part "$1" "$2" "${@:4}" "$python" -m pytest -p no:cacheprovider $how -q --tb=short --confcutdir tests/device $3
}

if [ -z "$plan" ]; then
    mkdir -p "$out"
    [ -e "$out/visit.md" ] || printf '| part | result | s | last line |\n|---|---|---:|---|\n' >"$out/visit.md"
fi
experts=tests/device/test_device_experts.py ops=tests/device/test_device_ops.py graphs=tests/device/test_device_graphs.py
[ "$device" = cpu ] || part card 20 nvidia-smi
part machine 60 "$python" -m mpoe_kernels.info
tests neurons 180 "$experts::test_neurons_of_any_number_of_tokens"
tests stress 120 tests/device/test_device_stress.py
# Checked against float64 by the benchmark itself, before they are timed.
timed="--suite layers --phases forward,train"
bench neurons-times 300 $timed --only neurons --backend ${kernels%,cuda}
part trace 60 "$python" -m mpoe_bench.layers --only neurons --trace "$out/traces"
bench others-times 300 $timed --only hidden,separable,paper,light --backend $kernels --minutes 4.5
tests instructions 60 tests/device/test_device_instructions.py
tests bfloat16 240 "$experts $ops -k bfloat16"
checked='' # small cases with tokens, an Inf among them
for backend in triton cuda; do
    checked+=" $ops::test_routing_is_the_same_everywhere[$backend-700-64-2-11] $ops::test_strategies[$backend-light-bfloat16]"
done
for shape in neurons hidden; do
    checked+=" $experts::test_experts[triton-bfloat16-$shape]"
    checked+=" $experts::test_an_infinite_token_spoils_its_own_row_alone[triton-$shape]"
done
# PyTorch's caching allocator would hide overruns inside its blocks.
tests memcheck 180 "$checked" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9
bench step 60 --suite models --only 'T5 neurons' --backend auto --minutes .3
# The first launch of each; containers may refuse ncu.
part profile 60 ncu --set basic --filter-mode per-launch-config --launch-count 1 \
    --kernel-name 'regex:^(neurons_fused|hidden_rows|fused)_kernel$' "$python" -m mpoe_bench.layers
# Last, in processes of their own: a capture that breaks off spoils its process.
tests graphs 80 "$graphs -k graph"
bench graphs-times 80 --suite layers --only neurons --phases $graph --backend ${kernels%,cuda} --minutes 1
if [ -z "$plan" ]; then
    echo "$out.tar.gz"
    ! grep -q '| WRONG |' "$out/visit.md"
fi
