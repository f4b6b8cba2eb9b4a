"""Photos -> searchable model in one command, which fits into a time.

    matryoshka fit photos --minutes 10
    result = matryoshka.fit("photos", minutes=10, report=print)

Looks at the photos, chooses what a new user cannot choose (resolution, backbone, batch size, rate,
epochs), and calls the programs in order: train, eval, analyze, gradcam, embed, index, report. All
outputs are in one folder; the same command resumes an interrupted run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from matryoshka import config
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.config.limits import MAX_MINUTES, MAX_SEED
from matryoshka.runtime import DEVICES

if TYPE_CHECKING:
    from matryoshka.models import NestedModel

Report = Callable[[str], None]

STATE = "fit.json"


class FitError(ValueError):
    """Photos or options that fit cannot work with; the message names the remedy."""

    user_error = True


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of fit itself; all options of train are options of fit, too."""

    photos: str = config.option(
        help="photos/<class>/*; or photos/train/<class>/* and photos/val/<class>/*; or any folder "
        "with --labels",
        positional=True,
        metavar="PHOTOS",
        file_name=True,
    )
    minutes: float = config.option(
        10.0, help="time from the start to the last line", above=0, high=MAX_MINUTES
    )
    output: str | None = config.option(
        None,
        help="folder of all outputs; unset: runs/<name of PHOTOS>",
        metavar="DIR",
        file_name=True,
    )
    labels: str | None = config.option(
        None,
        help="CSV with the columns path,label (and split: train, val, test), or JSON lines with "
        "these keys; paths are relative to PHOTOS",
        metavar="FILE",
        file_name=True,
    )
    val_share: float = config.option(
        0.15,
        help="share of each class to validate on, if PHOTOS has no validation part",
        above=0,
        high=0.5,
    )
    seed: int = config.option(0, help="seed of the split and of the training", low=0, high=MAX_SEED)
    device: str = config.option("auto", help="auto: CUDA, else MPS, else CPU", choices=DEVICES)


@dataclass
class FitResult:
    """Outputs of a fit.

    folder: all outputs. prefixes: {dim: {"top1": percent, "top5": percent}} on the validation
    images, of which there are `images`. seconds: from start to end, of the last start.
    """

    folder: Path
    prefixes: dict[int, dict[str, float]]
    images: int
    choices: dict[str, Any]
    warnings: list[str]
    seconds: float

    @property
    def model(self) -> Path:
        return self.folder / FINAL

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def load(self) -> NestedModel:
        """The trained model, on the CPU, in eval mode."""
        from matryoshka.checkpoint import load_model

        return load_model(self.model)


class FitParser(config.FlagParser):
    """Fit's own options as flags; every option of train, `--section.option=value`, is one, too."""

    def parse_args(self, argv: Sequence[str] | None = None) -> SimpleNamespace:
        """fit's options, and `options`: {section.option: value} of train's that were given."""
        own, of_train = split_options(sys.argv[1:] if argv is None else argv)
        args = super().parse_args(own)
        args.options = train_options(of_train)
        return args


def parser() -> FitParser:
    description = (
        "From a folder of photos to a searchable model, in a time that you choose.\n\n"
        "    matryoshka fit photos --minutes 10\n"
        "    matryoshka fit photos --labels labels.csv --output runs/birds\n"
        "    matryoshka fit photos --model.arch=resnet34 --resolution.max_res=96\n\n"
        "Chooses resolution, backbone, batch size, rate and epochs, and prints them. Every option "
        "of `matryoshka train` overrides a choice. The same command resumes an interrupted run. "
        "Ends with the accuracy of every prefix, a report, and an index to search."
    )
    return FitParser("fit", description, (FitOptions,))


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    fit(
        args.photos,
        minutes=args.minutes,
        output=args.output,
        labels=args.labels,
        val_share=args.val_share,
        seed=args.seed,
        device=args.device,
        options=args.options,
        report=lambda line: print(line, flush=True),
    )
    return 0


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words of fit's own options, words of train's): those with a dot in the option's name."""
    own: list[str] = []
    train: list[str] = []
    waiting = list(reversed(argv))
    while waiting:
        word = waiting.pop()
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and "." in name and "/" not in name):
            own.append(word)
            continue
        train.append(word)
        if not equals and waiting and not waiting[-1].startswith("--"):
            train.append(waiting.pop())
    return own, train


# What fit decides itself: the data, and the folder.
OWN_KEYS = (
    "data.train_dataset",
    "data.val_dataset",
    "logging.folder",
    "logging.run_id",
    "training.resume",
    "training.eval_only",
    "training.path",
    "training.device",
    "training.seed",
)


def train_options(words: Sequence[str]) -> dict[str, Any]:
    """{section.option: value} of the options of train that were given; ConfigError as train's."""
    from matryoshka.training.options import parser as train_parser

    given = config.flat(train_parser().parse_args(words))
    names = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    for name in names & set(OWN_KEYS):
        raise config.ConfigError(f"--{name}: fit sets it itself; leave it out")
    return {name: given[name] for name in given if name in names}


def fit(
    photos: str | os.PathLike,
    *,
    minutes: float = 10.0,
    output: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    val_share: float = 0.15,
    seed: int = 0,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> FitResult:
    """Train a nested model of photos within `minutes`; evaluate, index and report it.

    photos, labels: see matryoshka.data.photos.find_photos. output: unset, runs/<name of photos>.
    options: those of `matryoshka train`, such as {"model.arch": "resnet34"}, which override the
    choices. report: receives every line of progress. Resumes an interrupted run of the same folder
    and options, and returns the result of a finished one.

    Errors of the user are one line: FitError, PhotoError, and those of the programs.
    """
    started = time.perf_counter()
    root = Path(photos)
    folder = Path(output) if output is not None else Path("runs") / root.resolve().name
    settings = {
        "photos": str(root.resolve()),
        "labels": None if labels is None else str(Path(labels).resolve()),
        "minutes": minutes,
        "val_share": val_share,
        "seed": seed,
        "device": device,
        "options": json.loads(json.dumps(dict(options or {}))),
    }
    check_folders(root, folder)
    # Read by OpenMP when torch is imported. By default, waiting threads spin: beside another busy
    # process, training was 5 times slower. 1,000 turns cost 6 % alone, see bench/NOTES.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Here, because torch takes seconds to import: `--help` does not wait for it.
    from matryoshka.fitting.output import Progress
    from matryoshka.fitting.run import Run

    with (
        Progress(report or (lambda _: None), 60 * minutes, started) as progress,
        contextlib.ExitStack() as held,
    ):
        run = Run(folder, root, settings, progress, held)
        prefixes, images = run.all()
    return FitResult(
        folder=folder,
        prefixes=prefixes,
        images=images,
        choices=run.state["choices"],
        warnings=run.state["images"]["warnings"],
        seconds=run.state["seconds"],
    )


def check_folders(root: Path, folder: Path) -> None:
    """FitError if photos and outputs would be in one another."""
    photos, outputs = root.resolve(), folder.resolve()
    if photos == outputs or photos in outputs.parents:
        raise FitError(
            f"--output {folder}: is inside the photos of {root}; give a folder elsewhere"
        )
    if outputs in photos.parents and (folder / STATE).exists():
        raise FitError(f"{root}: is inside the outputs of {folder}; give another --output")
