"""Train MoCo-Matryoshka with that repository's flags: train_ssl.py under another name."""

import importlib

from matryoshka import config
from matryoshka.training.ssl_options import parser


def main() -> int:
    config.check_first(parser("moco"))  # torch takes two seconds to import
    return importlib.import_module("matryoshka.train.train_ssl").main(face="moco")


if __name__ == "__main__":
    raise SystemExit(main())
