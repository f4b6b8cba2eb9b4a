"""train/train_cifar10.py under its old place, the root: train_cifar10.py --net vit_small."""

import sys

from matryoshka import cli

if __name__ == "__main__":
    raise SystemExit(cli.main(["cifar", *sys.argv[1:]]))
