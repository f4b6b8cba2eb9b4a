"""Entry point of the command `matryoshka`, and of `python -m matryoshka`.

It imports next to nothing before it decides what an interrupt does: the imports that follow take
seconds.
"""

from matryoshka.interrupts import quit_on_interrupt


def main() -> int:
    """The command `matryoshka`; its exit status."""
    quit_on_interrupt()
    from matryoshka import cli

    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
