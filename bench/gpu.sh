#!/usr/bin/env bash
# Everything there is to do on a GPU, in one command and ten minutes: correctness first, then times.
#   bench/gpu.sh                   results in bench/results/<card>-<date>
#   bench/gpu.sh --minutes 5       what does not fit is left out and named
#   bench/gpu.sh --device cpu      the same steps on tiny sizes and no GPU, to try the script
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m mpoe_bench.gpu "$@"
