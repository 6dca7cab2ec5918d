#!/usr/bin/env bash
# Runs other people's tests on our classes. Their code is read in place or in a temporary folder, never copied here.
#
#   tools/external_suites.sh SNAPSHOT [FAMILY ...]   Transformers' model tests, then PEFT's suite; for
#                                                    named families, only theirs
#   tools/external_suites.sh peft [PYTEST ARGUMENT ...]   only PEFT's, of the installed version
#
# SNAPSHOT: a checkout of Transformers with src, tests, utils (tried: 5.16.0.dev0, decba1d2). Its dependencies
# must be importable in the versions that it requires; EXTERNAL_SITE names a folder that is searched for them first.
# Also: pip install pytest parameterized psutil datasets accelerate peft. FAMILY: model types of mpoe.models.table;
# default: those below. SELECT: an expression for pytest -k; RUN_SLOW=1: slow tests too (torch.export among them).
# MPOE_SHAPE: shape of the experts in Transformers' tests (default: separable).
# RESULTS: folder of the results (default: external_results), which tests/external/table.py reads; SUFFIX: suffix of
# the file names, for a second part. Only PEFT's sdist is downloaded.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,16p' "$0" >&2; exit 2; }
ours=$(cd "$(dirname "$0")/.." && pwd)
results=${RESULTS:-external_results}
mkdir -p "$results"
results=$(cd "$results" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() { # a failed test is a result; any other status of pytest is an error
    local status=0
    python -m pytest -q -p no:cacheprovider -p tally --tb=short -rfE "$@" || status=$?
    [ "$status" -le 1 ]
}

models() {
    local snapshot family
    snapshot=$(cd "$1" && pwd)
    [ -d "$snapshot/src/transformers" ] && [ -d "$snapshot/tests/models" ] || {
        echo "SNAPSHOT must be a checkout of Transformers; $snapshot has no src/transformers or no tests/models" >&2
        exit 2
    }
    shift
    [ $# -gt 0 ] || set -- t5 gpt2 bert llama vit bart roberta opt mistral qwen3
    for family in "$@"; do
        echo "=== Transformers: $family"
        cp "$ours/tests/external/transformers_models.py" "$scratch/test_models.py"
        (
            cd "$scratch"
            export MPOE_FAMILIES=$family EXTERNAL_RESULTS=$results/transformers-$family${SUFFIX:+-$SUFFIX}.json
            export PYTHONPATH=${EXTERNAL_SITE:+$EXTERNAL_SITE:}$snapshot/src:$snapshot:$ours/tests/external:$ours
            run -p conftest --rootdir="$scratch" ${SELECT:+-k "$SELECT"} test_models.py
        )
    done
}

peft() {
    local version kind
    version=$(python -c 'import peft; print(peft.__version__)')
    python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d "$scratch" "peft==$version"
    tar -xzf "$scratch/peft-$version.tar.gz" -C "$scratch"
    cd "$scratch/peft-$version"
    rm -rf src # the installed package is tested
    touch tests/__init__.py
    for kind in mpoe dense; do # the dense model runs only the tests that ours failed
        local again=()
        if [ "$kind" = dense ]; then
            mapfile -t again < <(python "$ours/tests/external/table.py" --failed "$results/peft-mpoe.json")
            [ ${#again[@]} -gt 0 ] || { echo '{}' >"$results/peft-dense.json"; break; }
            set -- "${again[@]}"
        fi
        echo "=== PEFT $version: $kind"
        EXTERNAL_KIND=$kind EXTERNAL_RESULTS=$results/peft-$kind.json HF_HUB_CACHE=$scratch/hub-$kind \
            PYTHONPATH=$ours/tests/external:$ours run -p peft_models -o addopts= -o filterwarnings= "$@"
    done
}

PEFT_MODELS="LlamaForCausalLM or GPT2LMHeadModel or OPTForCausalLM or qwen2 or T5For or BartFor or BertModel"
if [ "$1" = peft ]; then
    shift
    # LoRA on one family of each kind: a decoder, an encoder with a decoder, an encoder.
    [ $# -gt 0 ] || set -- tests/test_decoder_models.py tests/test_encoder_decoder_models.py \
        tests/test_feature_extraction_models.py -k "(LlamaForCausalLM or T5For or BertModel) and LoraConfig and not AdaLora"
    peft "$@"
else
    models "$@"
    [ $# -gt 1 ] || peft tests/test_decoder_models.py tests/test_encoder_decoder_models.py tests/test_feature_extraction_models.py \
        -k "$PEFT_MODELS"
fi
python "$ours/tests/external/table.py" "$results"
