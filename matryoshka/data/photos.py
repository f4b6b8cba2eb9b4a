"""A user's photos with their classes: folders or a table of labels, and the files left out.

    found = find_photos("photos")  # photos/<class>/*, or photos/{train,val}/<class>/*
    found = find_photos("photos", labels="labels.csv")  # columns path,label
    train, val = split(found.train, share=0.15, seed=0)

`Photos` is a source of images for `write_beton`. Every file that is not taken has a reason; hidden
folders are not looked into.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matryoshka.data.sources import EXTENSIONS, PARTS
from matryoshka.files import as_text, read_regular

TRAIN = "train"
VAL_NAMES = ("val", "valid", "validation")
TEST = "test"
SHOWN = 3  # names that a message lists
_COLUMNS = {"path", "label", "split"}


class PhotoError(ValueError):
    """Photos that cannot be used; the message names the file and the remedy."""

    user_error = True


class LeftOut(NamedTuple):
    """A file that was not taken. name: relative to the photos' folder."""

    name: str
    reason: str


@dataclass(frozen=True)
class Photos:
    """Labelled image files, a source for `write_beton`.

    root: folder that `names` are relative to. labels: int64 [N], positions in `classes`.
    """

    root: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def read(self, index: int) -> bytes:
        """The bytes of an image file. OSError if it cannot be read."""
        return read_regular(self.path(index))

    def name(self, index: int) -> str:
        """The file's path, relative to the root."""
        return self.names[index]

    def counts(self) -> np.ndarray:
        """int64 [C]: images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def take(self, rows: np.ndarray) -> Photos:
        """The photos of some rows, with the same classes."""
        names = [self.names[row] for row in rows.tolist()]
        return replace(self, names=names, labels=self.labels[rows])


@dataclass(frozen=True)
class Found:
    """Photos by part; val and test are None where the user has none. notes: lines for the user."""

    train: Photos
    val: Photos | None = None
    test: Photos | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, Photos]:
        """{"train": ..., "val": ..., "test": ...} without those that are None."""
        parts = {TRAIN: self.train, "val": self.val, TEST: self.test}
        return {name: photos for name, photos in parts.items() if photos is not None}


def find_photos(root: str | os.PathLike, labels: str | os.PathLike | None = None) -> Found:
    """Find the images below `root` and their classes.

    Without `labels`, `root` has one folder per class, or `train/` and `val/` (and `test/`) above
    such folders. labels: a CSV with the columns path and label (and split: train, val, test), or
    JSON lines with these keys; paths are relative to `root`. PhotoError, one line, for a folder
    without classes or images, and for a table that does not fit the folder.
    """
    root = Path(root)
    if not root.exists():
        raise PhotoError(f"{root}: no such folder")
    if not root.is_dir():
        raise PhotoError(f"{root}: is not a folder of photos")
    if labels is not None:
        return _find_by_table(root, Path(labels))

    folders = _folders(root)
    parts = [name for name in folders if name.lower() in PARTS]
    # A class may be called "test": folders are parts only if nothing but parts is there.
    present = {name.lower() for name in parts}
    if TRAIN in present and len(parts) == len(folders):
        return _find_parts(root, parts)
    if TRAIN in present and present.intersection(VAL_NAMES):
        others = [name for name in folders if name not in parts]
        shown = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        raise PhotoError(
            f"{root}: has other folders ({shown}) beside {' and '.join(parts)}; move them away, or "
            "give --labels FILE with the columns path,label,split"
        )
    photos, left_out = _find_classes(root, "")
    return Found(photos, left_out=left_out)


def split(
    photos: Photos, *, share: float, seed: int, together: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut off a validation part: rows (train [M], val [K]), both sorted.

    Stratified: of n images of a class, round(share x n) but at least one and at most half, and none
    of a class with a single image. The choice depends on the seed and the names alone, not on the
    order of the files. together: int64 [N], a group per image; images whose group has several
    members are kept on the training side, because near duplicates on both sides would flatter the
    accuracy.
    """
    rng = np.random.default_rng(seed)
    order = np.array(sorted(range(len(photos)), key=photos.names.__getitem__), np.int64)
    order = order[rng.permutation(len(order))]
    alone = np.ones(len(photos), bool)
    if together is not None:
        alone = np.bincount(together)[together] == 1
    chosen = np.zeros(len(photos), bool)
    for label, count in enumerate(photos.counts().tolist()):
        candidates = order[(photos.labels[order] == label) & alone[order]]
        wanted = min(max(1, round(share * count)), count // 2)
        chosen[candidates[:wanted]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def count_reasons(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """{reason: files}, the most frequent first."""
    return dict(Counter(file.reason for file in left_out).most_common())


# ---------------------------------------------------------------- folders


def _find_parts(root: Path, parts: Sequence[str]) -> Found:
    """The layout train/ val/ test/, each with class folders."""
    by_part = {}
    left_out = [LeftOut(name, _reason(name)) for name in _files(root)]
    for name in parts:
        lower = name.lower()
        part = "val" if lower in VAL_NAMES else lower
        if part in by_part:
            raise PhotoError(f"{root}: has several folders for validation: {', '.join(parts)}")
        by_part[part], more = _find_classes(root, name)
        left_out += more
    train = by_part[TRAIN]
    for part, photos in by_part.items():
        by_part[part] = _relabelled(photos, train.classes, f"{root}: {part}")
    return Found(train, by_part.get("val"), by_part.get(TEST), left_out)


def _find_classes(root: Path, part: str) -> tuple[Photos, list[LeftOut]]:
    """Photos of `root/part/<class>/**`, and the files that are not taken."""
    folder = root / part
    left_out = [LeftOut(os.path.join(part, name), _reason(name)) for name in _files(folder)]
    loose = [file for file in left_out if _is_image(file.name)]
    classes = []
    names: list[str] = []
    labels: list[int] = []
    for name in _folders(folder):
        images = []
        for file in sorted(_walk(root, os.path.join(part, name))):
            if _is_image(file):
                images.append(file)
            else:
                left_out.append(LeftOut(file, _reason(file)))
        if images:
            labels += [len(classes)] * len(images)
            names += images
            classes.append(as_text(name))
    if not names:
        if loose:
            raise PhotoError(
                f"{folder}: has {len(loose)} images but no class folders; put the images of each "
                f"class into a folder, {folder}/<class>/, or give --labels FILE with the columns "
                "path,label"
            )
        reasons = "; ".join(f"{n} {reason}" for reason, n in count_reasons(left_out).items())
        raise PhotoError(
            f"{folder}: has no images ({' '.join(EXTENSIONS)}) in class folders"
            + (f"; left out: {reasons}" if reasons else "")
        )
    for name, count in Counter(classes).items():
        if count > 1:
            raise PhotoError(
                f"{folder}: {count} class folders have the name {name} when bytes that are not "
                "UTF-8 are written as \\xNN; rename one"
            )
    photos = Photos(root, names, np.array(labels, np.int64), classes)
    return photos, left_out


def _relabelled(photos: Photos, classes: list[str], where: str) -> Photos:
    """The same photos with the labels of `classes`. PhotoError for a class that is not in it."""
    position = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in photos.classes if name not in position]
    if unknown:
        shown = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
        raise PhotoError(f"{where}: has classes that the training part lacks: {shown}")
    to_label = np.array([position[name] for name in photos.classes], np.int64)
    return replace(photos, labels=to_label[photos.labels], classes=classes)


def _folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _files(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if not e.is_dir())


def _walk(root: Path, folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Every file below root/folder, relative to root. Follows symbolic links, but no cycles."""
    status = os.stat(root / folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if not entry.is_dir():
                yield name
            elif not entry.name.startswith("."):
                yield from _walk(root, name, (*above, identity))


def _is_image(name: str) -> bool:
    base = os.path.basename(name)
    return not base.startswith(".") and base.lower().endswith(EXTENSIONS)


def _reason(name: str) -> str:
    """Why a file is not taken, as text that is the same for all files of its kind."""
    base = os.path.basename(name)
    suffix = os.path.splitext(base)[1].lower()
    if base.startswith("."):
        return "hidden file"
    if suffix in EXTENSIONS:
        return "in no class folder"
    if suffix in (".heic", ".heif"):
        return "HEIC (pip install pillow-heif)"
    return f"not an image ({suffix or 'no extension'})"


# ---------------------------------------------------------------- a table of labels


def _find_by_table(root: Path, table: Path) -> Found:
    rows = list(_read_table(table))
    if not rows:
        raise PhotoError(f"{table}: has no rows; expected the columns path,label")
    missing = []
    by_part: dict[str, dict[str, str]] = {}  # part -> {name: class}
    for number, row in rows:
        name = os.path.normpath(row["path"])
        if os.path.isabs(name):
            name = os.path.relpath(name, root)
        part = row.get("split") or TRAIN
        part = "val" if part in VAL_NAMES else part
        if part not in (TRAIN, "val", TEST):
            raise PhotoError(f"{table}, line {number}: split {part!r}: expected train, val or test")
        # Not Path.is_file: it raises OSError for names that are too long.
        if not os.path.isfile(root / name):
            missing.append((number, name))
            continue
        known = by_part.setdefault(part, {})
        if known.setdefault(name, row["label"]) != row["label"]:
            raise PhotoError(
                f"{table}, line {number}: {name} has two labels, {known[name]!r} and "
                f"{row['label']!r}"
            )
    if missing:
        number, name = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise PhotoError(f"{table}, line {number}: {root / name} does not exist{more}")
    if TRAIN not in by_part:
        raise PhotoError(f"{table}: no row has split train")

    left_out = []
    listed = {name for names in by_part.values() for name in names}
    for name in [*_files(root), *(f for d in _folders(root) for f in sorted(_walk(root, d)))]:
        if name in listed:
            continue
        reason = "not in the labels file" if _is_image(name) else _reason(name)
        # The table itself may be in the folder, and broken links, which samefile cannot follow.
        if not (os.path.exists(root / name) and os.path.samefile(root / name, table)):
            left_out.append(LeftOut(name, reason))
    taken: dict[str, dict[str, str]] = {}
    for part, names in by_part.items():
        taken[part] = {name: label for name, label in names.items() if _is_image(name)}
        left_out += [LeftOut(name, _reason(name)) for name in names if name not in taken[part]]
    # A class without an image of a known format has nothing to train on: it is not a class.
    classes = sorted(set(taken[TRAIN].values()))
    parts = {}
    for part, names in taken.items():
        parts[part] = _relabelled(_of_table(root, names), classes, f"{table}: split {part}")
    train = parts[TRAIN]
    if not len(train):
        raise PhotoError(f"{table}: names no image of {root} ({' '.join(EXTENSIONS)})")
    return Found(train, parts.get("val"), parts.get(TEST), left_out)


def _of_table(root: Path, names: Mapping[str, str]) -> Photos:
    classes = sorted(set(names.values()))
    position = {name: label for label, name in enumerate(classes)}
    ordered = sorted(names, key=lambda name: (names[name], name))
    labels = np.array([position[names[name]] for name in ordered], np.int64)
    return Photos(root, ordered, labels, classes)


def _read_table(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV or a JSONL file. PhotoError for other columns."""
    try:
        text = read_regular(table).decode("utf-8-sig")
    except OSError as error:
        raise PhotoError(f"--labels {table}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PhotoError(f"--labels {table}: is not UTF-8 text") from None
    if table.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        yield from _json_rows(table, text)
        return
    try:
        yield from _csv_rows(table, text)
    except csv.Error as error:
        raise PhotoError(f"--labels {table}: is not valid CSV ({error})") from None


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    if not {"path", "label"} <= set(columns) or set(columns) - _COLUMNS:
        raise PhotoError(
            f"--labels {table}: columns {','.join(columns) or 'none'}: expected path,label "
            "(and split)"
        )
    for row in reader:
        values = {key: (row.get(key) or "").strip() for key in columns}
        yield reader.line_num, _checked(values, table, reader.line_num)


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it splits at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise PhotoError(f"--labels {table}, line {number}: is not valid JSON") from None
        if not isinstance(row, dict) or not {"path", "label"} <= set(row) or set(row) - _COLUMNS:
            raise PhotoError(
                f"--labels {table}, line {number}: expected an object with path and label "
                "(and split)"
            )
        values = {key: str(value) for key, value in row.items() if value is not None}
        yield number, _checked(values, table, number)


def _checked(row: dict[str, str], table: Path, number: int) -> dict[str, str]:
    for key in ("path", "label"):
        if not row.get(key):
            raise PhotoError(f"--labels {table}, line {number}: {key} is empty")
    if as_text(row["label"]) != row["label"]:
        raise PhotoError(
            f"--labels {table}, line {number}: label {as_text(row['label'])} is not text"
        )
    return row
