"""Train MoCo-Matryoshka with that repository's flags: train_ssl.py under another name."""

from matryoshka import config
from matryoshka.training.ssl_options import parser

if __name__ == "__main__":
    config.check_first(parser("moco"))

from matryoshka.train.train_ssl import main

if __name__ == "__main__":
    raise SystemExit(main(face="moco"))
