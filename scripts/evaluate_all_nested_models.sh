#!/usr/bin/env bash
# Evaluate the exports of all dims: table, confusion matrices, accuracy against dim and cost.
#
#   scripts/evaluate_all_nested_models.sh [DATASET] [NET] [PATCH] [options of matryoshka dims]
#
# Paths are relative to the repository's root; results: eval_results/<net>_<dataset>_patch<patch>/.
set -euo pipefail
cd "$(dirname "$0")/.."
words=(cifar10 vitfixedposdualpatchnorm 4)
for i in 0 1 2; do
    [[ $# -gt 0 && $1 != -* ]] || break
    words[i]=$1
    shift
done
name="${words[1]}_${words[0]}_patch${words[2]}"
shopt -s nullglob
models=(checkpoint/nested_models/"$name"_dim*.safetensors)
if [[ ${#models[@]} -eq 0 ]]; then
    models=(checkpoint/nested_models/"$name"_dim*.pth)
fi
if [[ ${#models[@]} -eq 0 ]]; then
    echo "error: checkpoint/nested_models has no ${name}_dim*; train with --mrl_flag first" >&2
    exit 2
fi
data=(--dataset "${words[0]}")
if [[ -L ${models[0]} && $* != *--data-root* ]]; then
    data=() # a link into its run, which knows its test images
fi
exec matryoshka dims --path "${models[@]}" "${data[@]}" --map none \
    --output "eval_results/$name" "$@"
