"""Build ImageNet-4K, the retrieval benchmark of the MRL paper, from ImageNet-21K: one .beton with
the database, one with the queries.

    python train/build_imagenet4k.py --data imagenet21k --classes IDtoClass.txt --output imagenet4k

--data contains one folder of images per class, named by its WordNet id (n00005787). --classes is
the list of the paper's repository, one `00005787-n -> benthos: definition` per line. Of each class,
50 images become queries and 1,000 the database, drawn with --seed from its files in sorted order;
images that no decoder can read are skipped. The paper's program for the draw is not published, so
results differ slightly from the paper's.

    imagenet4k_queries.beton      labels are ranks of the sorted WordNet ids; a .json beside each
    imagenet4k_database.beton
    imagenet4k.jsonl              the options, then one line per class with its images in the order
                                  of both files; written last

The program works class by class. If it is killed and started again with the same options, it
resumes at the next class, and the files are the same. Finished classes are kept in `.parts` until
the end, so twice the space is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from matryoshka import config
from matryoshka.config.limits import MAX_COUNT, MAX_THREADS
from matryoshka.data import BetonError, BetonFile, write_beton
from matryoshka.data.layout import PageWriter, page_size_for
from matryoshka.data.options import MAX_RESOLUTION, MAX_SEED, TRANSCODE, WriteOptions
from matryoshka.data.reader import manifest_path, printable
from matryoshka.data.sources import EXTENSIONS, decode_image
from matryoshka.files import AtomicFile, open_regular, read_regular, write_atomically

QUERIES = "imagenet4k_queries.beton"
DATABASE = "imagenet4k_database.beton"
MANIFEST = "imagenet4k.jsonl"
PARTS = ".parts"  # folder of the finished classes
PLAN = "plan.json"  # the options that its parts were made with
LINE = re.compile(r"(\d{8})-n -> (.+)")
WNID = re.compile(r"n\d{8}")
LISTS = ("cmyk", "other_content", "damaged", "broken")  # of a side file
SHOWN = 5  # names that a message lists


class BuildError(ValueError):
    """An unusable image tree or class list; the message names it and the remedy."""

    user_error = True


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of the draw and of the files."""

    data: str = config.option(
        help="ImageNet-21K: one folder of images per WordNet id", metavar="DIR", file_name=True
    )
    classes: str = config.option(
        help="the list of classes, IDtoClass.txt", metavar="FILE", file_name=True
    )
    output: str = config.option(
        help="folder of the files, created if missing", metavar="DIR", file_name=True
    )
    database_per_class: int = config.option(
        1000, help="images per class in the database", low=1, high=MAX_COUNT
    )
    queries_per_class: int = config.option(
        50, help="images per class among the queries", low=1, high=MAX_COUNT
    )
    seed: int = config.option(0, help="seed of the draw", low=0, high=MAX_SEED)
    leave_out_small: bool = config.option(
        False,
        help="leave out, and list, classes that are missing or have too few readable images; "
        "default: an error",
    )
    max_resolution: int = config.option(
        500, help="longest side in pixels", low=1, high=MAX_RESOLUTION
    )
    write_mode: str = config.option("jpg", help="how images are stored", choices=("jpg", "raw"))
    jpeg_quality: int = config.option(90, help="JPEG quality", low=1, high=100)
    transcode: str = config.option("never", help="copy JPEGs losslessly", choices=TRANSCODE)
    names: bool = config.option(
        False, help="also keep the file names in the side files of the .beton files"
    )
    workers: int = config.option(0, help="threads; 0: all cores", low=0, high=MAX_THREADS)
    overwrite: bool = config.option(False, help="replace files of other options")


def parser() -> config.FlagParser:
    return config.flat_parser("build_imagenet4k.py", __doc__ or "", BuildOptions)


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    WriteOptions(**store_options(args))  # raises for options that contradict each other
    output = Path(args.output)
    wnids = read_classes(Path(args.classes))
    # Everything that decides the files: a resumed run must have the same values.
    plan = {
        "database_per_class": args.database_per_class,
        "queries_per_class": args.queries_per_class,
        "seed": args.seed,
        "leave_out_small": args.leave_out_small,
        "max_resolution": args.max_resolution,
        "write_mode": args.write_mode,
        "jpeg_quality": args.jpeg_quality,
        "transcode": args.transcode,
        "names": args.names,
        "classes": hashlib.sha256("\n".join(wnids).encode()).hexdigest(),
    }
    if finished(output, plan, args.overwrite):
        shutil.rmtree(output / PARTS, ignore_errors=True)  # left by a kill just before the end
        print(f"{output}: finished already")
        return 0

    # ---- class by class ----
    images = list_images(Path(args.data), wnids, args)
    parts = output / PARTS
    prepare(parts, plan, args.overwrite)
    before = sum((parts / f"{wnid}.json").exists() for wnid in images)
    if before:
        print(f"{output}: resumes, {before:,} of {len(images):,} classes are finished")
    for wnid in tqdm(images, leave=False, unit="class", disable=not sys.stderr.isatty()):
        if not (parts / f"{wnid}.json").exists():
            write_class(parts, Path(args.data), wnid, images[wnid], args)

    # ---- the two files ----
    summary = assemble(output, wnids, plan)
    print(
        f"{summary.classes:,} classes: {summary.queries:,} queries, {summary.database:,} images "
        "in the database"
    )
    if summary.left_out:
        print(
            f"{len(summary.left_out)} classes left out, see {output / MANIFEST}: "
            f"{some(summary.left_out)}"
        )
    print(f"written  {output / QUERIES} {output / DATABASE} {output / MANIFEST}")
    return 0


def some(names: Sequence[str]) -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def read_classes(file: Path) -> list[str]:
    """WordNet ids of a class list, sorted. Lines with only an id (n00005787) are accepted, too."""
    wnids = []
    try:
        lines = read_regular(file).decode().splitlines()
    except UnicodeDecodeError:
        raise BuildError(f"--classes {file}: is not a text file; give IDtoClass.txt") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line.strip())
        if not found and not WNID.fullmatch(line.strip()):
            raise BuildError(
                f"--classes {file}: line {number} is {printable(line[:60])!r}, expected "
                "'00005787-n -> benthos: ...'"
            )
        wnids.append(f"n{found[1]}" if found else line.strip())
    if not wnids or len(set(wnids)) < len(wnids):
        twice = [wnid for wnid, count in Counter(wnids).items() if count > 1]
        reason = f"names {twice[0]} twice" if twice else "names no class"
        raise BuildError(f"--classes {file}: {reason}")
    return sorted(wnids)


def list_images(data: Path, wnids: list[str], args: SimpleNamespace) -> dict[str, list[str]]:
    """File names of every class, sorted; [] for classes that are left out."""
    if not data.is_dir():
        raise BuildError(f"--data {data}: no such folder")
    needed = args.database_per_class + args.queries_per_class
    images = {}
    for wnid in wnids:
        try:
            with os.scandir(data / wnid) as entries:
                names = sorted(e.name for e in entries if is_image(e))
        except (FileNotFoundError, NotADirectoryError):
            names = []
        images[wnid] = names
    # All classes are checked before anything is written: building takes long.
    small = [f"{wnid} ({len(names)})" for wnid, names in images.items() if len(names) < needed]
    if len(small) == len(wnids) or (small and not args.leave_out_small):
        remedy = "unpack them, or add --leave-out-small"
        if len(small) == len(wnids):
            remedy = "is it ImageNet-21K?"
        raise BuildError(
            f"--data {data}: {len(small)} of {len(wnids)} classes have fewer than {needed} "
            f"images: {some(small)}; {remedy}"
        )
    return {wnid: names if len(names) >= needed else [] for wnid, names in images.items()}


def is_image(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and entry.name.lower().endswith(EXTENSIONS)


def drawn(names: list[str], wnid: str, seed: int) -> list[str]:
    """Shuffle a class's files: a pure function of its sorted names, its id and the seed."""
    # The id is part of the key: the draw of a class does not depend on the other classes.
    key = np.array([seed, int(wnid[1:])], np.uint64)
    stream = np.random.Philox(key=key).random_raw(len(names))  # NumPy guarantees this stream
    return [names[i] for i in np.argsort(stream, kind="stable")]


# ---------------------------------------------------------------- class by class


def finished(output: Path, plan: dict, overwrite: bool) -> bool:
    """Whether all files exist. BuildError if they were made with other options."""
    manifest = output / MANIFEST
    if overwrite or not manifest.exists():
        return False
    with open_regular(manifest) as file:
        must_match(manifest, read_json(file.readline()), plan)
    return all((output / name).exists() for name in (QUERIES, DATABASE))


def prepare(parts: Path, plan: dict, overwrite: bool) -> None:
    """Create the folder of parts, or check that its parts were made with the same options."""
    stored = read_json(read_regular(parts / PLAN)) if (parts / PLAN).exists() else None
    if stored is not None and not overwrite:
        must_match(parts, stored, plan)
    elif stored != plan:
        shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True, exist_ok=True)
    for leftover in parts.glob(".*.tmp"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    write_atomically(parts / PLAN, json.dumps(plan).encode())


def read_json(data: bytes) -> Any:
    """The value, or {} if `data` is not JSON: it then matches no options."""
    try:
        return json.loads(data)
    except ValueError:
        return {}


def must_match(path: Path, stored: Any, plan: dict) -> None:
    stored = stored if isinstance(stored, dict) else {}
    for key, value in plan.items():
        if stored.get(key) != value:
            option = key.replace("_", "-")
            before = str(stored.get(key))[:20]
            now = str(value)[:20]
            raise BuildError(
                f"{path}: was made with --{option} {before}, not {now}; choose another --output, "
                "or add --overwrite"
            )


def store_options(args: SimpleNamespace) -> dict[str, Any]:
    return {
        key: getattr(args, key)
        for key in ("max_resolution", "write_mode", "jpeg_quality", "transcode")
    }


class ClassImages:
    """Some images of one class, as a source of write_beton."""

    def __init__(self, data: Path, wnid: str, names: Sequence[str]) -> None:
        self._folder = data / wnid
        self._names = names
        self.classes = [wnid]
        self.labels = np.zeros(len(names), np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        return read_regular(self._folder / self._names[index])

    def name(self, index: int) -> str:
        return self._names[index]


def write_class(
    parts: Path, data: Path, wnid: str, names: list[str], args: SimpleNamespace
) -> None:
    """Write both parts of one class, then the record that they are complete.

    Without enough images, only write the record that the class is left out. Unreadable images are
    replaced by the next ones of the draw.
    """
    left = drawn(names, wnid, args.seed)
    unreadable: list[str] = []
    record: dict[str, Any] = {"wnid": wnid}
    for kind, count in (("queries", args.queries_per_class), ("database", args.database_per_class)):
        while names:
            chosen = left[:count]
            if len(chosen) < count:
                if not args.leave_out_small:
                    raise BuildError(
                        f"{data / wnid}: has too few readable images, {len(unreadable)} are not: "
                        f"{some(unreadable)}; replace them, or add --leave-out-small"
                    )
                names = []
                break
            part = parts / f"{wnid}.{kind}.beton"
            broken = write_part(part, ClassImages(data, wnid, chosen), args)
            if not broken:
                record[kind] = chosen
                left = left[count:]
                break
            # Draw again without them; the part that was just written is replaced.
            unreadable += sorted(broken)
            left = [name for name in left if name not in broken]
    if not names:
        record = {"wnid": wnid, "left_out": "too few readable images"}
    # Last: a class without this record is written again after a kill.
    write_atomically(
        parts / f"{wnid}.json", json.dumps(record | {"unreadable": unreadable}).encode()
    )


def write_part(path: Path, images: ClassImages, args: SimpleNamespace) -> set[str]:
    """Write one part; return the names of unreadable images, without which the part is valid."""
    try:
        manifest = write_beton(images, path, num_workers=args.workers, **store_options(args))
    except BetonError:  # raised also if none of the images can be read
        broken = {images.name(i) for i in range(len(images)) if not readable(images, i)}
        if len(broken) < len(images):
            raise
        return broken
    return {entry["name"] for entry in manifest["broken"]}


def readable(images: ClassImages, index: int) -> bool:
    try:
        decode_image(images.read(index))
    except (OSError, ValueError):
        return False
    return True


# ---------------------------------------------------------------- the two files


class Summary(NamedTuple):
    """Counts of the finished benchmark. left_out: WordNet ids."""

    classes: int
    queries: int
    database: int
    left_out: list[str]


def assemble(output: Path, wnids: list[str], plan: dict) -> Summary:
    """Join the parts into the two files, write the manifest, and remove the parts."""
    parts = output / PARTS

    def record(wnid: str) -> dict:
        return read_json(read_regular(parts / f"{wnid}.json"))

    kept = [wnid for wnid in wnids if "left_out" not in record(wnid)]
    if not kept:
        raise BuildError(
            f"{output}: every one of the {len(wnids)} classes has too few readable images"
        )
    # In the folder of parts: the output gets complete files only.
    queries = join(parts / QUERIES, "queries", map(record, kept), kept, plan)
    database = join(parts / DATABASE, "database", map(record, kept), kept, plan)
    with AtomicFile(parts / MANIFEST) as file:
        for content in itertools.chain([plan], map(record, wnids)):
            file.append((json.dumps(content) + "\n").encode())
        file.flush()
        file.publish()
    (output / MANIFEST).unlink(missing_ok=True)  # it must never describe other files
    for name in (QUERIES, DATABASE):
        # the side file first: a .beton must never be seen with other class names
        for path in (manifest_path(parts / name), parts / name):
            os.replace(path, output / path.name)
    os.replace(parts / MANIFEST, output / MANIFEST)
    shutil.rmtree(parts, ignore_errors=True)
    return Summary(len(kept), queries, database, sorted(set(wnids) - set(kept)))


def join(path: Path, kind: str, records: Iterable[dict], wnids: list[str], plan: dict) -> int:
    """Write `path` and its side file from the parts of one kind; return the number of images."""
    # The number of records is needed first, because they come before the pages.
    total = len(wnids) * plan[f"{kind}_per_class"]
    side: dict[str, Any] = {"counts": Counter()} | {key: [] for key in LISTS}
    if plan["names"]:
        side["names"] = []
    with AtomicFile(path) as file, AtomicFile(manifest_path(path)) as side_file:
        pages = PageWriter(file.write, total, page_size_for(3 * plan["max_resolution"] ** 2))
        bar = tqdm(records, leave=False, unit="class", disable=not sys.stderr.isatty())
        for label, record in enumerate(bar):
            wnid = record["wnid"]
            with BetonFile(path.with_name(f"{wnid}.{kind}.beton")) as part:
                copy(part, pages, label)
                manifest = part.manifest or {}
            side["options"] = manifest["options"] | {"names": plan["names"]}
            side["counts"].update(manifest["counts"])
            for key in LISTS:
                side[key] += [
                    entry | {"name": f"{wnid}/{entry['name']}"} for entry in manifest[key]
                ]
            if plan["names"]:
                side["names"] += [f"{wnid}/{name}" for name in record[kind]]
        side |= {
            "num_samples": pages.count,
            "num_bytes": pages.finish(),
            "classes": wnids,
            "imagenet4k": plan,
        }
        side_file.append(json.dumps(side, indent=1).encode() + b"\n")
        file.flush()
        side_file.flush()
        side_file.publish()
        file.publish()
    return total


def copy(part: BetonFile, pages: PageWriter, label: int) -> None:
    """Append the stored bytes of all images of a part, without decoding them."""
    (samples,) = part.fetch(np.arange(len(part)))
    for i in range(len(part)):
        start = int(samples.offset[i])
        size = int(samples.size[i])
        stored = np.ascontiguousarray(samples.data[start : start + size]).data
        pages.add(
            stored, int(samples.mode[i]), int(samples.width[i]), int(samples.height[i]), label
        )
    samples.check()


if __name__ == "__main__":
    raise SystemExit(main())
