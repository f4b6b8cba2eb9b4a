#!/usr/bin/env bash
# The best trials of the sweep that run_sweep.sh runs; nothing is started.
#
#   scripts/find_top_sweeps.sh [--top 3]
set -euo pipefail
cd "$(dirname "$0")/.."
exec matryoshka sweep sweeps/adan_betas_decay.yaml --trials 0 --top 3 "$@"
