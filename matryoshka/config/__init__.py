"""Options of programs: dataclasses in, one validated namespace out.

    @dataclass(frozen=True)
    class LR:
        lr_peak_epoch: int = option(2, help="epoch of the highest rate", low=0)

    cfg = read({"lr": LR, "training": Training}, argv)    # cfg.lr.lr_peak_epoch
    args = flat_parser("eval.py", "...", LR).parse_args(argv)    # args.lr_peak_epoch

options.py   declarations: type, legal range, choices; every value is checked there
sections.py  `--config-file x.yaml`, `--section.option=value` (fastargs' syntax)
flags.py     the papers' flags: `--path x --mrl`, positional arguments, subcommands
mixed.py     both on one command line
files.py     YAML and JSON files of options
layout.py    help texts
check_first.py  finds mistakes in a command line before slow imports
outcome.py   errors that a user can correct become one line and exit status 2
"""

from matryoshka.config.check_first import check_first
from matryoshka.config.flags import CommandParser, FlagParser, command_parser, flat_parser
from matryoshka.config.mixed import MixedParser
from matryoshka.config.options import AUTO, ConfigError, check_fields, check_name, option
from matryoshka.config.outcome import program
from matryoshka.config.sections import (
    SectionParser,
    ShortForm,
    default_options,
    flat,
    names_a_pipe,
    neutral_options,
    read,
    section_parser,
    to_yaml,
)

__all__ = [
    "AUTO",
    "CommandParser",
    "ConfigError",
    "FlagParser",
    "MixedParser",
    "SectionParser",
    "ShortForm",
    "check_fields",
    "check_first",
    "check_name",
    "command_parser",
    "default_options",
    "flat",
    "flat_parser",
    "names_a_pipe",
    "neutral_options",
    "option",
    "program",
    "read",
    "section_parser",
    "to_yaml",
]
