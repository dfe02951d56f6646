#!/bin/bash
# The native library as 64-bit Arm processors have it, and tests of it, on another machine: cross-compiled, and run by
# QEMU under an Arm's Python and PyTorch. Not timed: QEMU emulates what instructions do, not what they cost.
#
#   tests/arm/run.sh [--cpu NAME] [pytest's arguments]      by default all tests of the levels named neon*
#
# --cpu is QEMU's, e.g. neoverse-n1 (no bf16; PyTorch needs dot products); by default all that it knows.
# Needs Debian or Ubuntu: apt-get install qemu-user g++-aarch64-linux-gnu; dpkg --add-architecture arm64; apt-get update.
# The first run brings 200 MB into build/arm. An hour for the default on one core; tests that start a Python of their own
# fail there.
set -euo pipefail
cd "$(dirname "$0")/../.."
cpu=max,sve=off
if [ "${1:-}" = --cpu ]; then cpu=$2; shift 2; fi
host=${PYTHON:-.venv/bin/python}
arm=$PWD/build/arm
root=$arm/root site=$arm/site tree=$arm/tree

if [ ! -e "$arm/.ready" ]; then
    mkdir -p "$arm/debs" "$root" "$site"
    (cd "$arm/debs" && apt-get download python3.11:arm64 {,lib}python3.11-minimal:arm64 libpython3.11{,-stdlib,-dev}:arm64 \
        libc6:arm64 libgcc-s1:arm64 libstdc++6:arm64 libgomp1:arm64 zlib1g:arm64 libexpat1:arm64 libssl3:arm64 libffi8:arm64 \
        liblzma5:arm64 libbz2-1.0:arm64 libsqlite3-0:arm64 libuuid1:arm64)
    for deb in "$arm"/debs/*.deb; do dpkg -x "$deb" "$root"; done
    # The last PyTorch for Arm's CPUs alone: later ones bring CUDA.
    "$host" -m pip install -q --no-deps --target "$site" --python-version 3.11 --only-binary=:all: \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        torch==2.10.0 numpy safetensors typing_extensions sympy mpmath filelock jinja2 markupsafe networkx fsspec \
        pytest pytest-timeout iniconfig packaging pluggy pygments hypothesis sortedcontainers psutil pybind11
    touch "$arm/.ready"
fi

mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard -- csrc mc_kernels mc_runtime tests bench examples '*.py' pyproject.toml |
    tar -c --null --ignore-failed-read -T - | tar -x -C "$tree"
cd "$tree"
export QEMU_LD_PREFIX=$root PYTHONPATH=$site:$tree OMP_NUM_THREADS=1
python=(qemu-aarch64 -cpu "$cpu" "$root/usr/bin/python3.11")
CXX=${CXX:-aarch64-linux-gnu-g++} CXXFLAGS="-I$root/usr/include/python3.11 -I$root/usr/include" "${python[@]}" -c '
from pathlib import Path
import build_native
build_native.build(Path("mc_kernels/_native"), Path("../native"))'
if [ $# = 0 ]; then set -- tests/kernels -k neon; fi
exec "${python[@]}" -m pytest -p no:cacheprovider "$@"
