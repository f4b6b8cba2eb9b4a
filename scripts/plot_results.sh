#!/usr/bin/env bash
# One page with the accuracy by dim of all results, overlaid, and the cost of the first.
#
#   scripts/plot_results.sh [RESULTS ...]      dims.json files; unset: all in eval_results
#
# Paths are relative to the repository's root; results: eval_results/report.html.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s nullglob
results=("$@")
[[ $# -gt 0 ]] || results=(eval_results/*/dims.json)
if [[ ${#results[@]} -eq 0 ]]; then
    echo "error: eval_results has no */dims.json; run scripts/evaluate_all_nested_models.sh" >&2
    exit 2
fi
mkdir -p eval_results
exec matryoshka report --results "${results[@]}" --dims "${results[0]}" \
    --output eval_results/report.html
