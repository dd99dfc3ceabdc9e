#!/usr/bin/env bash
# `make train`: train the demo at TP2 x PP2 on this machine, then let one rank continue a sentence from its checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONSAFEPATH=1 OMP_NUM_THREADS=1

run=runs/demo
.venv/bin/orthant train configs/demo.yaml "run.folder=$run" "$@"
.venv/bin/orthant generate "$run" --prompt "The ship" --max-new-tokens 40
