#!/usr/bin/env bash
# Runs everything that needs a GPU, in parts with a time limit.
#
#     benchmarks/gpu_suite.sh OUT [PARTS...] [--seconds N] [--device cuda|cpu]
#     benchmarks/gpu_suite.sh OUT                     # build, tests and bench, in at most 8 minutes
#     benchmarks/gpu_suite.sh OUT tune --seconds 200
#
#   build      compiles in place for this GPU           info.json
#   tests      pytest -m gpu                            verified.json: goes into vidmem_kernels/verified
#   bench      every row of targets.py, then the rest   bench.json
#   tune       the fastest tile of every kernel         tuned.json: goes into vidmem_kernels/tuned
#   profile    memory and time against length           profile.json, lengths.json
#   sanitize   compute-sanitizer over some tests        sanitize.json
#   train      gpu_train.sh                             weights, curves
#
# Each part may take N seconds (default: 70 to 240, see --help); a part that fails or times out does not affect the
# others. Results are written immediately. OUT contains at most 8 files of at most 16 MiB; further files are in
# more.tar.gz (in pieces: cat more.tar.gz.* | tar xz). Exit code: 0 all parts passed, 1 some failed, 2 nothing was run.
#
# Needs Python with torch, triton, numpy, pytest, pybind11 and setuptools, and nvcc; pytest-xdist to run the tests within
# their time limit. Downloads nothing and needs no git: VIDMEM_COMMIT, or a file COMMIT at the root, gives the commit.
#
#   PYTHON=python3            interpreter
#   GPU_SUITE_WHEELS=FOLDER   wheels to install first (gpu_wheels.txt): libraries to measure against
set -u

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
export SUITE_CALLED_FROM="$PWD" PYTHONPATH="$ROOT:$ROOT/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET VIDMEM_BACKEND
cd "$ROOT" || exit 2
exec "${PYTHON:-python3}" -m benchmarks.suite "$@"
