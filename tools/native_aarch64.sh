#!/usr/bin/env bash
# The CPU kernels (csrc/common, csrc/cpu) without torch, compiled for 64-bit ARM and run by an emulator: the path of
# csrc/cpu/gemm/vector.h for processors without SSE2. Results of the linear op are compared with the right ones; those of
# routing and experts must be written whole and have the same bits with any number of threads. Time says nothing here.
#   tools/native_aarch64.sh [FOLDER]    builds in FOLDER (default build/aarch64) and runs; fails on any wrong result
# Needs CMake, Ninja, and on Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/aarch64}
for program in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja; do
    command -v $program >/dev/null && continue
    echo "$program was not found; on Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user cmake ninja-build" >&2
    exit 1
done
cmake -S tests/native/cpp -B "$folder" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS=-Werror >/dev/null
cmake --build "$folder"
# linear alone takes minutes.
for program in routing experts linear; do
    qemu-aarch64 -L /usr/aarch64-linux-gnu "$folder/$program"
done
