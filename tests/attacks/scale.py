"""How long an attack lasts: short in every run of the tests, long in `make attack`."""

import os

LONG = os.environ.get("MATRYOSHKA_ATTACK") == "1"


def scaled(short: int, long: int) -> int:
    """`long` in `make attack` (MATRYOSHKA_ATTACK=1), else `short`."""
    return long if LONG else short
