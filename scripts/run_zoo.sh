#!/usr/bin/env bash
# Train a net as the README of vision-transformers-cifar10 does.
#
#   scripts/run_zoo.sh NET [options of matryoshka cifar]     NET: vit_small, convmixer, swin, ...
#
# Other rows of that README are options: --patch 2, --size 48, --n_epochs 500, --device mps.
# Paths are relative to the repository's root; results: runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "error: name a net first, e.g. scripts/run_zoo.sh vit_small" >&2
    exit 2
fi
net=$1
shift
case $net in
    vit_small | convmixer | swin) options=(--n_epochs 400) ;;
    mlpmixer) options=(--n_epochs 500 --lr 1e-3) ;;
    *) options=(--n_epochs 200) ;;
esac
exec matryoshka cifar --net "$net" "${options[@]}" "$@"
