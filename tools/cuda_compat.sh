#!/usr/bin/env bash
# One wheel for torch with and without CUDA: builds it against the torch of `python` on PATH, audits its libraries for
# symbols outside the stable ABI (torch-abi-audit, if installed), and imports it with other torches. Needs nvcc, no GPU.
#   tools/cuda_compat.sh FOLDER PYTHON...    wheel in FOLDER; each PYTHON is of the version of `python` and has a torch >=
#                                            2.11, with CUDA or without
# TORCH_CUDA_ARCH_LIST limits what is compiled; all architectures take a few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
shift
rm -rf "$folder/unpacked" "$folder"/*.whl
mkdir -p "$folder"
MPOE_BUILD=cuda python setup.py -q bdist_wheel -d "$folder"
python -m zipfile -e "$folder"/mpoe-*.whl "$folder/unpacked"
if command -v torch-abi-audit >/dev/null; then
    for library in "$folder"/unpacked/mpoe_kernels/*.so; do
        torch-abi-audit --check both "$library"
    done
fi
cat >"$folder/check.py" <<'PYTHON'
import torch

import mpoe_kernels
from mpoe_kernels.cuda_library import CUDA_LIBRARY
from mpoe_kernels.native_library import NATIVE_LIBRARY

assert NATIVE_LIBRARY.reasons == (), NATIVE_LIBRARY
reasons = mpoe_kernels.backend_reasons()["cuda"]
if torch.version.cuda is None:
    assert CUDA_LIBRARY.reasons == (f"this torch, {torch.__version__}, is built without CUDA",), CUDA_LIBRARY
else:
    assert CUDA_LIBRARY.reasons == (), CUDA_LIBRARY
    for op in ("rows_times_block", "panel_product", "experts", "route", "combine"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mpoe_cuda::{op}", "CUDA"), op
print(f"torch {torch.__version__}: {CUDA_LIBRARY.info or 'CUDA kernels skipped'}; backend cuda: {reasons or 'runs'}")
PYTHON
for other in "$@"; do
    PYTHONPATH=$folder/unpacked "$other" "$folder/check.py"
done
