#!/usr/bin/env bash
# Train the VAE, the demo memory and its continuation on a GPU, for some minutes at a time.
#
#     python benchmarks/train_bundle.py                    # once, on any machine with PyAV: a film in at most 8 MiB
#     benchmarks/gpu_train.sh OUT [--minutes 4] [--bundle FILE] [--work FOLDER]
#     python benchmarks/gpu_train.py --join OUT -o FOLDER  # the models, for the command vidmem
#
# Called again it goes on: exactly from the checkpoints in the working folder (runs/gpu_train) while the machine stays; from the
# weights and the counts of steps in OUT on another one. Needs Python with torch and what vidmem_model does but PyAV,
# and peft; downloads nothing, needs no git.
# Leaves in OUT at most 8 files of at most 16 MiB: train.json (steps, speed, utilisation, held-out PSNR, curves),
# train.log, curves.png, held_out.png and the weights in pieces. Exit code: 0 a round is done, 2 it cannot begin.
#
#   PYTHON=python3   interpreter
set -u

case ${1-} in
  "" | -*) echo "usage: benchmarks/gpu_train.sh OUT [--minutes 4] [--bundle FILE] [--work FOLDER]" >&2; exit 2 ;;
esac
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd) || exit 2
shift
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
PYTHON=${PYTHON:-python3}
unset TRITON_INTERPRET VIDMEM_BACKEND

case " $* " in
  *" --device cpu "* | *" --device=cpu "*) ;;
  *)
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
      echo "no CUDA GPU, or no torch: nothing trained (--device cpu tries it out)" >&2
      exit 2
    fi
    ;;
esac

set -o pipefail
PYTHONUNBUFFERED=1 "$PYTHON" "$ROOT/benchmarks/gpu_train.py" "$OUT" "$@" 2>&1 | tee -i "$OUT/train.log"
