#!/usr/bin/env bash
# Adan, Adam and AdamW on vit_small, 200 epochs each, with the best values of the sweep.
#
#   scripts/compare_optimizers.sh [options of matryoshka cifar]
#
# Paths are relative to the repository's root; `matryoshka runs runs/*` shows the results.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--net vit_small --n_epochs 200 --lr 9e-4)
matryoshka cifar "${common[@]}" --opt adan --weight_decay 0.02 \
    --adan_beta1 0.035 --adan_beta2 0.11 --adan_beta3 0.015 "$@"
matryoshka cifar "${common[@]}" --opt adam "$@"
matryoshka cifar "${common[@]}" --opt adamw --weight_decay 0.02 "$@"
