#!/usr/bin/env bash
# Train a vision transformer of one width on CIFAR-10, for each width in DIMS.
#
#   DIMS="8 16 32" scripts/run_non_mrl_train.sh [options of matryoshka cifar]
#
# Paths are relative to the repository's root; results: runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
for dim in ${DIMS:-128}; do
    matryoshka cifar --net vitfixedposdualpatchnorm --dataset cifar10 --lr 0.0001 --bs 512 \
        --patch 4 --embedding_dim "$dim" --n_epochs 500 "$@"
done
