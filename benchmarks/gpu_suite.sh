#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes: build, tests, benchmarks, memory profile.
#
#     benchmarks/gpu_suite.sh OUT
#
# Builds in place for the architecture of this machine's GPU. Needs Python with torch, triton, pytest, pybind11 and
# setuptools, and nvcc, and pytest-xdist to run all tests in their time; installs and downloads nothing, needs no git.
# The profile and the tests of the model also need what vidmem_model does (python/pyproject.toml).
# Leaves in OUT a log of every part (build, tests, bench), info.json, verified.json (which kernels passed; to go into
# vidmem_kernels/verified), bench.json, profile.json and summary.json. A part that fails or runs out of its time loses nothing of the others. Exit code: 0 all parts passed,
# 1 some failed, 2 there is no CUDA GPU or no torch.
#
#   PYTHON=python3           interpreter
#   GPU_SUITE_PARTS="..."    some of: build tests bench profile (default: all)
#   GPU_SUITE_DEVICE=cpu     dry run of this script: tiny shapes on the CPU
set -u

if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu_suite.sh OUT" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd) || exit 2
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
cd "$ROOT" || exit 2

PYTHON=${PYTHON:-python3}
DEVICE=${GPU_SUITE_DEVICE:-cuda}
PARTS=${GPU_SUITE_PARTS:-build tests bench profile}
LOG_BYTES=1000000
export PYTHONPATH="$ROOT:$ROOT/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET VIDMEM_BACKEND

case $DEVICE in
  cuda | cpu) ;;
  *) echo "GPU_SUITE_DEVICE must be cuda or cpu, got $DEVICE" >&2; exit 2 ;;
esac
for part in $PARTS; do
  case $part in
    build | tests | bench | profile) ;;
    *) echo "GPU_SUITE_PARTS: must be some of build tests bench profile, got $part" >&2; exit 2 ;;
  esac
done

if ! "$PYTHON" -c 'import torch'; then
  echo "$PYTHON cannot import torch: nothing measured" >&2
  exit 2
fi
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA GPU: nothing measured" >&2
  exit 2
fi

SCRATCH=$(mktemp -d) || exit 2
trap 'rm -rf "$SCRATCH"' EXIT

# Seconds each part may take, 530 together.
declare -A BUDGET=([build]=110 [tests]=140 [bench]=235 [profile]=45)
ROWS=()
JSON_ROWS=()
FAILED=0

limited() { # limited [-s SIGNAL] SECONDS COMMAND...: the signal (TERM) at the limit, KILL ten seconds later
  timeout -k 10 "$@"
}

build() {
  local cuda=1
  if [ "$DEVICE" = cpu ]; then cuda=0; fi
  VIDMEM_BUILD_CUDA=$cuda limited $((BUDGET[build] - 20)) "$PYTHON" setup.py build_ext --inplace
  local status=$?
  # Also after a failed build: it tells what runs each op then, and why.
  limited 20 "$PYTHON" -m vidmem_kernels.info --json >"$OUT/info.json" || status=1
  return $status
}

tests() {
  local select=gpu
  local files=() workers=()
  if [ "$DEVICE" = cpu ]; then
    files=(tests/tools/test_install.py)
    select="not gpu"
  fi
  # Triton compiles some 900 kernels for the tests, about half a second each: more than one process has the time for.
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(env -u OMP_NUM_THREADS nproc)")  # with that set, nproc would not tell of cores
  else
    echo "pytest-xdist is missing: one process runs all tests"
  fi
  # A test file that needs a package missing here must not keep the others from running. INT: pytest still reports.
  OMP_NUM_THREADS=1 limited -s INT "${BUDGET[tests]}" "$PYTHON" -m pytest -m "$select" -q -p no:cacheprovider \
    --tb=short --continue-on-collection-errors --durations=10 --junitxml="$SCRATCH/tests.xml" \
    ${workers[@]+"${workers[@]}"} ${files[@]+"${files[@]}"}
  local status=$?
  if [ "$DEVICE" = cuda ]; then
    limited 20 "$PYTHON" benchmarks/verified.py "$SCRATCH/tests.xml" -o "$OUT/verified.json" || status=1
  fi
  return $status
}

bench() {
  local options=(--device cuda --seconds 0.5)
  local lengths=(--device cuda --seconds 0.2 --limit 0.3)
  if [ "$DEVICE" = cpu ]; then
    options=(--device cpu --ops gather_tokens quantize_rows --shapes smoke --quick)
    lengths=(--device cpu --seconds 0.01 --lengths 32 64 --heads 1 --channels 8)
  fi
  local status=0
  limited $((BUDGET[bench] - 35)) "$PYTHON" benchmarks/run.py "${options[@]}" \
    --time-limit $((BUDGET[bench] - 65)) -o "$OUT/bench.json" || status=$?
  # Time and memory against length: only in the log.
  limited 25 "$PYTHON" benchmarks/lengths.py "${lengths[@]}" || status=$?
  return $status
}

profile() {
  local options=()
  if [ "$DEVICE" = cpu ]; then
    options=(--lengths 0.2,0.4 --heads 2 --head-dim 32 --dtype float32)
  fi
  limited "${BUDGET[profile]}" "$PYTHON" -m vidmem_model profile --device "$DEVICE" ${options[@]+"${options[@]}"} -o "$SCRATCH/profile"
  local status=$?
  cp "$SCRATCH/profile/memory_vs_context.json" "$OUT/profile.json" || status=1
  return $status
}

run_part() {
  local part=$1 json=$2
  local start=$SECONDS status word
  rm -f "$OUT/$part.log" ${json:+"$OUT/$json"}
  echo "$part: at most ${BUDGET[$part]} s"
  "$part" >"$OUT/$part.log" 2>&1
  status=$?
  tail -c "$LOG_BYTES" "$OUT/$part.log" >"$SCRATCH/$part.log" && cp "$SCRATCH/$part.log" "$OUT/$part.log"
  local seconds=$((SECONDS - start))
  case $status in
    0) word=passed ;;
    124 | 137) word="out of time" ;;
    *) word=failed ;;
  esac
  if [ $status -ne 0 ]; then
    FAILED=1
    echo "--- last lines of $part.log"
    tail -n 15 "$OUT/$part.log"
    echo "---"
  fi
  if [ -n "$json" ] && [ ! -s "$OUT/$json" ]; then
    json=""
  fi
  ROWS+=("$(printf '%-8s  %-11s  %4s  %5s s  %s' "$part" "$word" "$status" "$seconds" "${json:--}")")
  JSON_ROWS+=("$(printf '{"part": "%s", "status": "%s", "exit_code": %d, "seconds": %d, "json": "%s"}' \
    "$part" "$word" "$status" "$seconds" "$json")")
  write_summary
}

write_summary() { # after every part, so that what has run is told even if this script is killed
  {
    printf '{"device": "%s", "seconds": %d, "passed": %s, "parts": [' \
      "$DEVICE" "$SECONDS" "$([ $FAILED -eq 0 ] && echo true || echo false)"
    local row separator=""
    for row in "${JSON_ROWS[@]}"; do
      printf '%s\n  %s' "$separator" "$row"
      separator=,
    done
    printf '\n]}\n'
  } >"$OUT/summary.json"
}

for part in $PARTS; do
  case $part in
    build) run_part build info.json ;;
    bench) run_part bench bench.json ;;
    profile) run_part profile profile.json ;;
    tests) run_part tests verified.json ;;
  esac
done

if [ -s "$OUT/bench.log" ]; then
  echo
  grep -A 200 '^| op ' "$OUT/bench.log"
fi
echo
printf '%-8s  %-11s  %4s  %7s  %s\n' part status exit time JSON
printf '%s\n' "${ROWS[@]}"
echo "total ${SECONDS} s; everything is in $OUT"
exit $FAILED
