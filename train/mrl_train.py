"""Train ReLIC + MRL-E with the flags of the repository relic: train_ssl.py under another name."""

from matryoshka.train.train_ssl import main as train_ssl


def main() -> int:
    return train_ssl(face="relic")


if __name__ == "__main__":
    raise SystemExit(main())
