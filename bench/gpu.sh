#!/usr/bin/env bash
# One visit to a GPU: correctness first, which ends the visit if something is wrong, then host time, and all cases
# compared with their peers. Called again, it continues where it stopped.
#   bench/gpu.sh                   results in bench/results/<card>-<date>, and in one archive next to that folder
#   bench/gpu.sh --minutes 5       what does not fit is left for the next call
#   bench/gpu.sh --plan            what would be done, and how long each part takes
#   bench/gpu.sh --device cpu      the same parts on tiny sizes and no GPU, to try the script
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m mpoe_bench.visit "$@"
