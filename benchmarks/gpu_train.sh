#!/usr/bin/env bash
# Trains the VAE, the demo memory and its continuation on a GPU, for some minutes at a time.
#
#     python benchmarks/train_bundle.py                    # once, on any machine with PyAV: a film in at most 8 MiB
#     benchmarks/gpu_train.sh OUT [--minutes 4] [--bundle FILE] [--work FOLDER]
#     python benchmarks/gpu_train.py --join OUT -o FOLDER  # the models, for the command vidmem
#
# Each call continues the training: on the same machine exactly from the checkpoints in the working folder
# (runs/gpu_train), on another machine from the weights and step counts in OUT. Needs Python with torch, peft and the
# requirements of vidmem_model except PyAV; downloads nothing and needs no git.
# Leaves in OUT at most 8 files of at most 16 MiB: train.json (steps, speed, utilisation, held-out PSNR, curves),
# train.log, curves.png, held_out.png and the weights in pieces. Exit code: 0 a round is done, 2 it cannot start.
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
