"""Train MoCo-Matryoshka with that repository's flags, by default on all GPUs or MIG slices."""

import importlib

from matryoshka import config
from matryoshka.training.ssl_options import parser


def main() -> int:
    config.check_first(parser("moco-distributed"))  # torch takes two seconds to import
    return importlib.import_module("matryoshka.train.train_ssl").main(face="moco-distributed")


if __name__ == "__main__":
    raise SystemExit(main())
