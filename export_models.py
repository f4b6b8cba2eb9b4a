"""inference/export_models.py under its old place, the root: export_models.py --checkpoint M."""

import sys

from matryoshka import cli

if __name__ == "__main__":
    raise SystemExit(cli.main(["export", *sys.argv[1:]]))
