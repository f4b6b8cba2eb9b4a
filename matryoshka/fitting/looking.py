"""Looks at a user's photos: which can be used, how they are split, what to warn of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from matryoshka.data import survey
from matryoshka.data.photos import Found, LeftOut, PhotoError, Photos, split
from matryoshka.data.survey import Looked
from matryoshka.fitting.output import Progress, bar
from matryoshka.training import recipe

LOOK_SHARE = 0.15  # of the time, at most, to look at the photos
MOST_VALIDATED = 5000  # images of a validation part that is cut off here
MARGIN = 2  # stored size over resolution: a random crop is then not enlarged
SMALLEST_STORED = 256  # pixels, for the pictures of the search page


@dataclass(frozen=True)
class Photographed:
    """The photos to use. parts: train, val and, if there is one, test; all can be read.

    side: median shorter side of the training part in pixels. longest: longest side to store.
    """

    parts: dict[str, Photos]
    left_out: list[LeftOut]
    warnings: list[str]
    side: int
    longest: int


def look(
    found: Found, root: Path, progress: Progress, *, val_share: float, seed: int
) -> Photographed:
    """Decode each photo once, within LOOK_SHARE of the time; split; print what was found.

    PhotoError if a part has no usable image, or if nothing can be learned or validated.
    """
    total = sum(map(len, found.parts().values()))
    progress.line("photos", f"{total:,} images in {root}")
    progress.stage("looking at the photos")
    left_out = list(found.left_out)
    warnings = list(found.notes)
    looked: dict[str, tuple[Photos, Looked]] = {}
    for name, photos in found.parts().items():
        seconds = LOOK_SHARE * progress.seconds * len(photos) / total
        with bar(len(photos), "looking") as update:
            seen = survey.look(photos, update, seconds=seconds, seed=seed)
        rows = usable(photos, seen, left_out, warnings)
        if not len(rows):
            raise PhotoError(no_image(root, name, len(photos), seen))
        reached = int(seen.readable.sum()) + len(seen.problems)
        if reached < len(photos):
            warnings.append(
                f"{name}: there is time for {reached:,} of {len(photos):,} images, chosen at "
                "random; more --minutes use more of them"
            )
        looked[name] = photos.take(rows), seen.take(rows)

    train, seen = looked["train"]
    check_classes(train, is_split="val" in looked, root=root)
    if "val" in looked:
        warnings += survey.overlap_warnings(looked)
    else:
        groups = survey.near_groups(seen)
        kept, cut = cut_validation(train, groups, share=val_share, seed=seed)
        if not len(cut):
            raise PhotoError(
                f"{root}: no class has two different images, so none can be kept for validation; "
                "add images, or give --labels FILE with fewer classes"
            )
        near = int((np.bincount(groups)[groups] > 1).sum())
        if near:
            warnings.append(
                f"{near:,} images have near duplicates; they are all used to train, none to "
                "validate"
            )
        looked["train"] = train.take(kept), seen.take(kept)
        looked["val"] = train.take(cut), seen.take(cut)

    parts = {name: photos for name, (photos, _) in looked.items()}
    warnings += survey.class_warnings(parts["train"])
    side = int(np.median(np.minimum(seen.width, seen.height)))
    longest = int(np.maximum(seen.width, seen.height).max())
    counts = parts["train"].counts()
    progress.line(
        "found",
        f"{len(parts['train']):,} to train, {len(parts['val']):,} to validate"
        + (f", {len(parts['test']):,} to test" if "test" in parts else "")
        + f"; {len(counts)} classes of {number_range(counts)}; shorter side {side} px",
    )
    for line in left_out_lines(left_out):
        progress.line("left out", line)
    stored = min(longest, max(SMALLEST_STORED, MARGIN * recipe.resolutions(side)[0]))
    return Photographed(parts, left_out, warnings, side, stored)


def usable(
    photos: Photos, seen: Looked, left_out: list[LeftOut], warnings: list[str]
) -> np.ndarray:
    """Rows of readable images without the copies, int64; appends the others to `left_out`."""
    for row, reason in seen.problems.items():
        left_out.append(LeftOut(photos.name(row), f"unreadable: {reason}"))
    copies = survey.exact_copies(seen)
    warnings += survey.label_conflicts(photos, copies)
    for copy in copies:
        reason = f"copy of another image ({photos.name(copy.of)})"
        left_out.append(LeftOut(photos.name(copy.row), reason))
    keep = seen.readable.copy()
    keep[[copy.row for copy in copies]] = False
    return np.flatnonzero(keep)


def cut_validation(
    photos: Photos, groups: np.ndarray, *, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`split`, with at most MOST_VALIDATED images in the validation part."""
    kept, cut = split(photos, share=share, seed=seed, together=groups)
    cut = cut[np.random.default_rng(seed).permutation(len(cut))]
    kept = np.concatenate((kept, cut[MOST_VALIDATED:]))
    return np.sort(kept), np.sort(cut[:MOST_VALIDATED])


def check_classes(photos: Photos, *, is_split: bool, root: Path) -> None:
    """PhotoError if there is nothing to learn, or nothing to validate on."""
    counts = photos.counts()
    used = np.flatnonzero(counts)
    if len(used) < 2:
        raise PhotoError(
            f"{root}: has one class only ({photos.classes[used[0]]}), and nothing to tell it from; "
            "add a folder for a second class"
        )
    if not is_split and counts.max() < 2:
        raise PhotoError(
            f"{root}: each of {len(used)} classes has one image, so none can be kept for "
            "validation; add images, or give --labels FILE with fewer classes"
        )


def no_image(root: Path, part: str, count: int, seen: Looked) -> str:
    if not seen.problems:
        return f"{root}: {part}: no image could be read in the time; give more --minutes"
    row, reason = next(iter(seen.problems.items()))
    return f"{root}: none of {count} images of {part} can be read (number {row + 1}: {reason})"


def number_range(counts: np.ndarray) -> str:
    """`500`, or `3 to 40` images."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def left_out_lines(left_out: list[LeftOut]) -> list[str]:
    """Numbers of files by kind of reason; for reasons that differ by file, with an example."""
    by_kind: dict[str, list[LeftOut]] = {}
    for file in left_out:
        kind = file.reason
        for several in ("unreadable", "copy of another image"):
            if kind.startswith(several):
                kind = several
        by_kind.setdefault(kind, []).append(file)
    lines = []
    for kind, files in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        first = files[0]
        example = "" if first.reason == kind else f", such as {first.name}: {first.reason}"
        example = example.replace(f"{kind}: ", "")
        noun = "file" if len(files) == 1 else "files"
        lines.append(f"{len(files):,} {noun}: {kind}{example}")
    return lines


def fingerprint(found: Found) -> str:
    """Changes when files are added, removed or have another size."""
    digest = hashlib.sha256()
    for part, photos in found.parts().items():
        digest.update(part.encode())
        for row, name in enumerate(photos.names):
            size = photos.path(row).stat().st_size if photos.path(row).exists() else -1
            label = photos.classes[photos.labels[row]]
            digest.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
