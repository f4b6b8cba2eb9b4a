#!/usr/bin/env bash
# Search Adan's rate, betas and weight decay on vit_small; run it again to continue.
#
#   scripts/run_sweep.sh [options of matryoshka sweep, e.g. --trials 30 --workers 2]
#
# Paths are relative to the repository's root; results: runs/sweeps/.
set -euo pipefail
cd "$(dirname "$0")/.."
exec matryoshka sweep sweeps/adan_betas_decay.yaml "$@"
