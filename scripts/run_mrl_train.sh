#!/usr/bin/env bash
# Train the vision transformers of all dims at once, with a shared patch projection, on CIFAR-10.
#
#   scripts/run_mrl_train.sh [options of matryoshka cifar, e.g. --dataset cifar100 --n_epochs 100]
#
# One transformer whose width is sliced: add --mrl_kind nested and leave out --nested_proj_mrl below.
# Paths are relative to the repository's root; results: runs/, checkpoint/nested_models/.
set -euo pipefail
cd "$(dirname "$0")/.."
exec matryoshka cifar --mrl_flag --nested_proj_mrl --net vitfixedposdualpatchnorm \
    --dataset cifar10 --lr 0.0001 --opt adam --mrl_dims 8,16,32,64,128,256,512 \
    --bs 512 --patch 4 --n_epochs 500 "$@"
