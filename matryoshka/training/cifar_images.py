"""The opened data sets of train_cifar10.py: to train on, to choose the best epoch, to test on."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from matryoshka.config import ConfigError
from matryoshka.data import Loader, open_dataset
from matryoshka.data.catalogue import normalisation
from matryoshka.data.named import validation_folder
from matryoshka.data.split import held_out
from matryoshka.training.loaders import check_classes
from matryoshka.training.supervised import SupervisedRun


class SmallImages:
    """The opened data sets of a run.

    train, validation, test: data sets. selects: whether the best epoch is chosen by `validation`.
    text, test_text: what the sets are, for the user.
    """

    def __init__(self, cfg: SimpleNamespace) -> None:
        c = cfg.cifar
        train = open_dataset(cfg.data.train_dataset)
        self.test = open_dataset(cfg.data.val_dataset)
        self.selects = True
        self.normalisation = normalisation(c.dataset)
        own = validation_folder(c.data)
        if own is not None and not c.select_on_test:
            check_classes(train, open_dataset(own))
        if c.select_on_test:
            self.train, self.validation = train, self.test
            self.text = f"chosen   the best epoch on the {len(self.test):,} TEST images"
        elif own is not None:
            self.train, self.validation = train, open_dataset(own)
            self.text = f"chosen   the best epoch on {len(self.validation):,} images of {own}"
        elif c.val_share == 0:
            self.train, self.validation = train, self.test
            self.selects = False
            self.text = "chosen   the weights of the last epoch, without validation"
        else:
            try:
                self.train, self.validation = held_out(train, c.val_share, cfg.training.seed)
            except ValueError as error:
                raise ConfigError(
                    f"--val_share {c.val_share:g}: {error}; give another share, or 0 to train on "
                    "all images"
                ) from None
            held = f"{len(self.validation):,} of the {len(train):,} training images"
            self.text = f"chosen   the best epoch on {held}"
        self._chose_on_test = c.select_on_test

    @property
    def val_role(self) -> str:
        """What `validation` is for, in the line about the data."""
        return "to test" if self.validation is self.test else "for validation"

    def evaluations(self, run: SupervisedRun) -> Iterator[tuple[str, Loader, str]]:
        """(name, loader, text) of the data sets that the best model is evaluated on."""
        if self.selects and not self._chose_on_test:
            text = f"{len(self.validation):,} images, which chose the epoch"
            yield "validation", run.val_loader, text
        text = "which chose the epoch" if self._chose_on_test else "used once"
        yield "test", run.loader(self.test), f"{len(self.test):,} images, {text}"
