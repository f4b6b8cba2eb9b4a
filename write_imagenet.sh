#!/usr/bin/env bash
# Write ImageNet as two .beton files: training images partly as JPEG, validation images as raw pixels.
#
#   IMAGENET_DIR=... WRITE_DIR=... ./write_imagenet.sh 500 0.50 90 [--cfg.num_workers=16 ...]
#
# reads   $IMAGENET_DIR/{train,val}/<class>/<image>
# writes  $WRITE_DIR/train_500_0.50_90.ffcv  and  $WRITE_DIR/val_500_uncompressed.ffcv
set -euo pipefail

usage() {
    echo "error: $1" >&2
    echo "usage: IMAGENET_DIR=... WRITE_DIR=... $0 MAX_RESOLUTION JPEG_SHARE JPEG_QUALITY [options of write_imagenet.py]" >&2
    exit 2
}

[[ $# -ge 3 ]] || usage "expected three arguments, got $#"
[[ -n "${IMAGENET_DIR:-}" ]] || usage "IMAGENET_DIR is not set (the folder with train and val)"
[[ -n "${WRITE_DIR:-}" ]] || usage "WRITE_DIR is not set (the folder to write to)"
resolution=$1 share=$2 quality=$3
shift 3

# train/write_imagenet.sh is a link to this file
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
if [[ -z "${PYTHON:-}" && -x "$here/.venv/bin/python" ]]; then
    PYTHON=$here/.venv/bin/python
fi

write() { # split, file name, options ...
    local split=$1 name=$2
    shift 2
    "${PYTHON:-python}" "$here/train/write_imagenet.py" --cfg.dataset=imagenet --cfg.split="$split" \
        --cfg.data_dir="$IMAGENET_DIR/$split" --cfg.write_path="$WRITE_DIR/$name" \
        --cfg.max_resolution="$resolution" "$@"
}

write train "train_${resolution}_${share}_${quality}.ffcv" --cfg.write_mode=proportion \
    --cfg.compress_probability="$share" --cfg.jpeg_quality="$quality" "$@"
write val "val_${resolution}_uncompressed.ffcv" --cfg.write_mode=raw "$@"
