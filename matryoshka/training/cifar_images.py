"""The opened data sets of train_cifar10.py: to train on, to choose the best epoch, to test on."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from matryoshka.config import ConfigError
from matryoshka.data import Loader, open_dataset
from matryoshka.data.catalogue import normalisation
from matryoshka.data.named import validation_part
from matryoshka.data.split import held_out
from matryoshka.training.cifar_options import CifarConfig
from matryoshka.training.loaders import check_classes
from matryoshka.training.supervised import SupervisedRun


class SmallImages:
    """The opened data sets of a run.

    train, validation, test: data sets. selects: whether there are images for validation, which the
    run is evaluated on. chosen_on: "validation" or "test", the images that choose the best epoch;
    None if the last one is taken. text: what they do, for the user.
    """

    def __init__(self, cfg: SimpleNamespace) -> None:
        c = cfg.cifar
        train = open_dataset(cfg.data.train_dataset)
        self.train = train
        self.test = open_dataset(cfg.data.val_dataset)
        self.selects = True
        self.chosen_on: str | None = "validation"
        self.normalisation = normalisation(c.dataset)
        own = validation_part(c.data)
        if c.select_on_test:
            self.validation = self.test
            self.chosen_on = "test"
            images = f"the {len(self.test):,} TEST images"
        elif c.val_share == 0:
            self.validation = self.test
            self.selects = False
            images = ""
        elif own is not None:
            self.validation = open_dataset(own)
            check_classes(train, self.validation)
            if c.val_share != CifarConfig.val_share:
                raise ConfigError(
                    f"--val_share {c.val_share:g}: the images for validation are {own}; leave it "
                    "out, or give 0 to choose nothing"
                )
            images = f"{len(self.validation):,} images of {own}"
        else:
            try:
                self.train, self.validation = held_out(train, c.val_share, cfg.training.seed)
            except ValueError as error:
                raise ConfigError(
                    f"--val_share {c.val_share:g}: {error}; give another share, or 0 to train on "
                    "all images"
                ) from None
            images = f"{len(self.validation):,} of the {len(train):,} training images"
        self.text = f"chosen   the best epoch on {images}"
        if not self.selects:
            self.chosen_on = None
            self.text = "chosen   the weights of the last epoch, without validation"
        elif cfg.logging.log_level == 0:
            self.chosen_on = None
            self.text = (
                f"chosen   the last epoch, the only one that logging.log_level=0 evaluates; "
                f"validation on {images}"
            )

    @property
    def val_role(self) -> str:
        """What `validation` is for, in the line about the data."""
        return "to test" if self.validation is self.test else "for validation"

    def evaluations(self, run: SupervisedRun) -> Iterator[tuple[str, Loader, str]]:
        """(name, loader, text) of the data sets that the best model is evaluated on."""
        chose = ", which chose the epoch"
        if self.validation is not self.test:
            text = chose if self.chosen_on == "validation" else ", held out"
            yield "validation", run.val_loader, f"{len(self.validation):,} images{text}"
        text = chose if self.chosen_on == "test" else ", used once"
        yield "test", run.loader(self.test), f"{len(self.test):,} images{text}"
