"""Public data sets by name: where they are, their parts, sizes and normalisation. Tables only."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.config.options import did_you_mean
from matryoshka.data.imagenet import IMAGENET_MEAN, IMAGENET_STD

FOLDER = "imagenet"  # the papers' name of any folder of class folders
# Names of the part to evaluate on; a set has one of them, or two.
HELD_OUT = ("val", "valid", "validation", "test")
HUGGING_FACE = "hf:"  # prefix of a data set of the Hugging Face hub, or of local parquet files


@dataclass(frozen=True)
class RemoteFile:
    """A file to download. md5, size (bytes): of the whole file."""

    url: str
    md5: str
    size: int

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class PublicSet:
    """A data set of images of one size.

    splits: its parts. held_out: the part to evaluate on. side: pixels. mean, std: of its values
    from 0 to 1, as its users normalise them. archive: None for a set that a library contains.
    """

    splits: tuple[str, ...]
    held_out: str
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    archive: RemoteFile | None = None


FOLDS = tuple(f"fold{k}" for k in range(10))  # of STL-10's training images, 1,000 each

# The binary editions: CIFAR's other files are pickles and Matlab's.
SETS: dict[str, PublicSet] = {
    "cifar10": PublicSet(
        splits=("train", "test"),
        held_out="test",
        side=32,
        mean=(0.4914, 0.4822, 0.4465),
        # The mean of the images' own deviations, which most repositories use; that of all pixels
        # is (0.2470, 0.2435, 0.2616).
        std=(0.2023, 0.1994, 0.2010),
        archive=RemoteFile(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            size=170_052_171,
        ),
    ),
    "cifar100": PublicSet(
        splits=("train", "test"),
        held_out="test",
        side=32,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        archive=RemoteFile(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            size=168_513_733,
        ),
    ),
    "stl10": PublicSet(
        splits=("train", "test", "unlabeled", *FOLDS),
        held_out="test",
        side=96,
        mean=(0.4467, 0.4398, 0.4066),
        std=(0.2603, 0.2566, 0.2713),
        archive=RemoteFile(
            "https://cs.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
            md5="91f7769df0f17e558f3565bffb0c7dfb",
            size=2_640_397_119,
        ),
    ),
    "tiny-imagenet": PublicSet(
        splits=("train", "val"),
        held_out="val",
        side=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        archive=RemoteFile(
            "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
            md5="90528d7ca1a48142e341f4ef8d21d0de",
            size=248_100_043,
        ),
    ),
    # scikit-learn's: no download
    "digits": PublicSet(
        splits=("train", "val"), held_out="val", side=32, mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
}


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a public data set; ImageNet's for any other name or path."""
    known = SETS.get(name)
    return (known.mean, known.std) if known else (IMAGENET_MEAN, IMAGENET_STD)


def check_set_name(name: str) -> None:
    """ValueError for a name that is neither in SETS, FOLDER, nor behind HUGGING_FACE."""
    names = [FOLDER, *SETS]
    if name not in names and not name.startswith(HUGGING_FACE):
        raise ValueError(f"expected {known_names(names)}{did_you_mean(name, names)}")


def check_split(name: str, split: str | None) -> None:
    """ValueError for a part that a public data set does not have."""
    splits = SETS[name].splits
    if split not in splits:
        shown = "no split given" if split is None else f"has no split {split}"
        raise ValueError(f"{name}: {shown}; it has {', '.join(splits)}")


def known_names(names: list[str] | None = None) -> str:
    """For messages: the known data sets."""
    listed = ", ".join(list(SETS) if names is None else names)
    return f"{listed} or {HUGGING_FACE}OWNER/NAME"
