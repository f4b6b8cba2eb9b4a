#!/usr/bin/env bash
# t-SNE plots of the embeddings of all exports: tsne_plots/.
#
#   scripts/run_tsne.sh [flags of tsne_nested_vit_embeddings.py]
set -euo pipefail
cd "$(dirname "$0")/.."
exec python scripts/tsne_nested_vit_embeddings.py "$@"
