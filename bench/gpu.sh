#!/usr/bin/env bash
# One visit to a GPU: a smoke test of what people use first, correctness, memory and races, speed, whole models.
#   bench/gpu.sh                   30 minutes; results in bench/results/visit-<date>, and in one archive next to it
#   bench/gpu.sh --minutes 10      what does not fit is left for the next call, which continues where this one stopped
#   bench/gpu.sh --plan            the commands of its parts, and how long each may take
#   bench/gpu.sh --device cpu      the same parts on tiny sizes and no GPU, to try the script; tests are listed, not run
# Only a wrong result ends a visit (status 1); a missing program or a part out of time is a line in the report.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda minutes=30 plan='' out=''
while [ $# -gt 0 ]; do
    case $1 in
        --device | --minutes | --out) declare "${1#--}=${2:?}" && shift 2 ;;
        --plan) plan=yes && shift ;;
        *) sed -n '2,7s/^# \{0,1\}//p' bench/gpu.sh >&2 && exit 64 ;;
    esac
done
python=${PYTHON:-python3}
out=${out:-bench/results/visit-$(date +%F)}
end=$((SECONDS + 60 * minutes))
export PYTHONPATH="$PWD:$PWD/bench:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}"
export MPOE_TEST_DEVICE=$device
if [ "$device" = cpu ]; then # plain PyTorch in place of the kernels
    export OMP_NUM_THREADS=1
else
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton_cache} MPOE_TEST_REQUIRED="eager triton"
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
    timeout "$limit" "$@" 2>&1 | sed -E "s#$PWD/##g; s#/[^ ]*/(site|dist)-packages/##g" | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) result=passed && echo "$name" >>"$out/done" ;;
        124) result="out of time" ;;
        127) result="not here" ;;
        *) result=failed ;;
    esac
    # Of a test that failed for another reason (a missing package), there is a line alone.
    grep -qE "^E +(AssertionError|assert )|wrong or failed: .*wrong result|ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]" "$out/$name.log" && result=WRONG
    last=$(grep -v '^[ =]*$' "$out/$name.log" | tail -n 1 | tr '|' '/' | cut -c 1-160)
    report "$name" "$result" $((SECONDS - began)) "$last"
    tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
    [ "$result" != WRONG ] || exit 1
}

tiny='' short=''
[ "$device" = cuda ] || tiny="--scale tiny --threads 1 --backend eager" short="--minutes .3"
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
bench smoke-triton 180 --suite layers --backend triton $short
part machine 30 "$python" -m mpoe_kernels.info
if [ "$device" = cuda ]; then
    part card 30 nvidia-smi
    architecture=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())" 2>/dev/null)
    part build 600 env MPOE_BUILD=cuda TORCH_CUDA_ARCH_LIST="${architecture/9.0/9.0a}" "$python" setup.py -q build_ext --inplace
fi
bench smoke-cuda 120 --suite layers --backend cuda $short
tests instructions 90 tests/device/test_device_instructions.py
# What people use first: hidden-side experts and neurons, in bfloat16 before float32; then the linear ops.
experts=tests/device/test_device_experts.py ops=tests/device/test_device_ops.py
tests experts-bfloat16 240 "$experts -k bfloat16"
tests linear-bfloat16 240 "$ops -k bfloat16"
checked='' # small cases with tokens, an Inf among them
for backend in triton cuda; do
    for shape in neurons hidden; do
        checked+=" $experts::test_experts[$backend-bfloat16-$shape]"
        checked+=" $experts::test_an_infinite_token_spoils_its_own_row_alone[$backend-$shape]"
    done
    checked+=" $ops::test_routing_is_the_same_everywhere[$backend-700-64-2-11] $ops::test_strategies[$backend-light-bfloat16]"
done
for tool in memcheck racecheck; do
    tests $tool 240 "$checked" compute-sanitizer --tool $tool --error-exitcode 9
done
bench targets 300 --suite layers --backend auto $short
tests graphs 180 tests/device/test_device_graphs.py
bench models 300 --suite models
# The first launch of each: of neurons, hidden-side experts, the fused chain and a separable product.
part profile 180 ncu --set basic --filter-mode per-launch-config --launch-count 1 \
    --kernel-name 'regex:^(neurons_fused|hidden_rows|fused|grouped_rows)_kernel$' \
    "$python" -m mpoe_bench.layers
tests experts-float32 180 "$experts -k float32"
tests linear-float32 180 "$ops -k float32"
bench peers 480 --suite gpu $short
[ -n "$plan" ] || echo "$out.tar.gz"
