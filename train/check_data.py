"""Inspect and verify .beton files, image folders and embeddings.

    matryoshka data info train.beton
    matryoshka data verify train.beton        # decodes every image, on all cores
    matryoshka data verify photos/train       # the images of a folder, before they are written
    matryoshka data verify embeddings/train   # what `matryoshka embed` wrote, by its hashes

Exit status: 0 all samples are sound, 1 some are broken (they are listed), 2 the file is unreadable.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from matryoshka import config
from matryoshka.config.limits import MAX_THREADS
from matryoshka.data import BetonError, BetonFile, ImageFolder, _native, layout, open_dataset
from matryoshka.data.crops import whole_images
from matryoshka.data.fields import TYPE_NAMES
from matryoshka.data.fingerprint import hash_file
from matryoshka.data.reader import manifest_path, printable
from matryoshka.data.sources import decode_image
from matryoshka.embeddings.reading import META, open_embeddings
from matryoshka.environment import available_cores
from matryoshka.files import as_text

EXAMINED = 500  # images whose JPEG header `info` reads
SHOWN = 20  # samples that a list on the terminal names
MATCHES, DIFFERS, NONE = "matches", "differs", "none"  # results of a comparison of checksums
BATCH = 256  # images that `verify` decodes in one call
SMALL = 16  # pixels per side of the decoded images, which `verify` discards
LISTS = {  # lists of the side file
    "broken": "left out, not readable",
    "damaged": "damaged, but readable",
    "cmyk": "CMYK, stored as RGB",
    "other_content": "named .jpg, but of another format",
    "heif": "left out, HEIC without pillow-heif",
}
COUNTS = {
    "resized": "reduced",
    "grayscale": "grayscale",
    "exif_orientation": "with an EXIF orientation",
}


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Options of both commands."""

    path: str = config.option(
        help="a .beton file; verify also takes a folder of class folders, or of embeddings",
        metavar="FILE",
        positional=True,
        file_name=True,
    )
    json: bool = config.option(False, help="print JSON")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(FileOptions):
    """Options of `verify`."""

    workers: int = config.option(0, help="threads; 0: all cores", low=0, high=MAX_THREADS)


def parser() -> config.CommandParser:
    return config.command_parser(
        "matryoshka data",
        __doc__ or "",
        "command",
        {
            "info": ("Show fields, sizes, classes, and how images are stored.", [FileOptions]),
            "verify": ("Decode everything and list what is broken.", [VerifyOptions]),
        },
    )


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "info":
        with BetonFile(args.path) as data:
            facts = describe(data)
        print(json.dumps(facts, indent=1) if args.json else info_text(facts))
        return 0
    if (Path(args.path) / META).is_file():
        found = verify_embeddings(args.path)
        print(json.dumps(found, indent=1) if args.json else embeddings_text(found))
        return 0
    found = verify_all(open_dataset(args.path), args.workers or available_cores())
    print(json.dumps(found, indent=1) if args.json else verify_text(found))
    return 1 if found["broken"] or found["checksum"] == DIFFERS else 0


# ---------------------------------------------------------------- info


class JpegHeader(NamedTuple):
    """Coding parameters of a JPEG stream.

    process: baseline, progressive, ... sampling: 4:2:0, ... spacing: pixels of an MCU row between
    two restart markers, 0 without markers.
    """

    process: str
    sampling: str
    spacing: int


# Marker codes, ITU-T T.81 table B.1
SOI = b"\xff\xd8"
SOS = 0xDA
DRI = 0xDD
NOT_SOF = (0xC4, 0xC8, 0xCC)  # DHT, JPG, DAC: inside the range of the SOF codes
PROCESSES = {  # SOF codes
    0xC0: "baseline",
    0xC1: "extended",
    0xC2: "progressive",
    0xC9: "arithmetic",
    0xCA: "arithmetic",
}
# horizontal and vertical luma factors, where both chroma components have 1 x 1
SAMPLINGS = {"11": "4:4:4", "21": "4:2:2", "22": "4:2:0", "12": "4:4:0", "41": "4:1:1"}


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the marker segments before the first scan; None if they are not those of a JPEG."""
    at = 2
    interval = 0  # MCUs between restart markers
    frame = None
    while data[:2] == SOI and at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte (T.81, B.1.1.2)
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            return None
        if marker == DRI and len(body) >= 2:
            interval = int.from_bytes(body[:2], "big")
        elif 0xC0 <= marker <= 0xCF and marker not in NOT_SOF:
            frame = PROCESSES.get(marker, f"SOF{marker - 0xC0}"), body
        elif marker == SOS:
            return _header(*frame, interval) if frame else None
        at += 2 + length
    return None


def _header(process: str, body: bytes, interval: int) -> JpegHeader | None:
    """From a frame header, T.81 figure B.3: three bytes per component from byte 6 on."""
    factors = [divmod(body[k], 16) for k in range(7, len(body), 3)]
    if len(body) < 6 or not factors or len(factors) != body[5]:
        return None
    h, v = factors[0]
    others = factors[1:]
    if not others:  # one component: an MCU is one block for all factors (T.81, A.2.2)
        return JpegHeader(process, "grayscale", interval * 8)
    sampling = SAMPLINGS.get(f"{h}{v}") if set(others) == {(1, 1)} else None
    if sampling is None:
        sampling = " ".join(f"{a}x{b}" for a, b in factors)
    return JpegHeader(process, sampling, interval * 8 * max(a for a, _ in factors))


def spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def describe(data: BetonFile) -> dict[str, Any]:
    """The facts that `info --json` prints."""
    jpg = np.flatnonzero(data.mode == layout.JPG)
    facts: dict[str, Any] = {
        "path": str(data.path),
        "version": layout.VERSION,
        "fields": [{"name": name, "type": TYPE_NAMES[kind]} for name, kind in data.fields],
        "samples": len(data),
        "file_bytes": data.num_bytes,
        "page_bytes": data.page_size,
        "modes": {"jpg": len(jpg), "raw": len(data) - len(jpg)},
        "image_bytes": spread(data.size),
        "width": spread(data.width),
        "height": spread(data.height),
        "jpeg": jpeg_facts(data, jpg) if len(jpg) else None,
        "classes": data.classes,
        "labels": label_facts(data) if layout.INT in (kind for _, kind in data.fields) else None,
        "side_file": str(manifest_path(data.path)) if data.manifest is not None else None,
        "options": {},
        "counts": {},
        "noticed": {},
    }
    manifest = data.manifest or {}  # another program may have written it: check every value
    for key in ("options", "counts"):
        if isinstance(manifest.get(key), dict):
            facts[key] = manifest[key]
    facts["noticed"] = {
        key: len(manifest[key]) for key in LISTS if isinstance(manifest.get(key), list)
    }
    return facts


def jpeg_facts(data: BetonFile, jpg: np.ndarray) -> dict[str, Any]:
    # Evenly spaced: images of one class, or of one source, are often neighbours.
    some = jpg[np.linspace(0, len(jpg) - 1, min(EXAMINED, len(jpg))).astype(np.int64)]
    (samples,) = data.fetch(some)
    headers = [
        jpeg_header(samples.data[start : start + min(size, 1 << 16)].tobytes())
        for start, size in zip(samples.offset.tolist(), samples.size.tolist(), strict=True)
    ]
    samples.check()
    known = [header for header in headers if header]
    spacings = np.array([header.spacing for header in known if header.spacing])
    return {
        "looked_at": len(some),
        "process": dict(Counter(header.process for header in known).most_common()),
        "sampling": dict(Counter(header.sampling for header in known).most_common()),
        "with_restart_markers": len(spacings),
        "restart_spacing": spread(spacings) if len(spacings) else None,
        "no_header": len(headers) - len(known),
    }


def label_facts(data: BetonFile) -> dict[str, Any]:
    values, counts = np.unique(data.labels, return_counts=True)
    return {
        "smallest": int(values[0]),
        "largest": int(values[-1]),
        "different": len(values),
        "per_class": spread(counts),
        "fewest": int(values[counts.argmin()]),
        "most": int(values[counts.argmax()]),
        "without_images": max(0, len(data.classes) - len(values)) if data.classes else 0,
    }


def amount(n: float) -> str:
    """A number of bytes with a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n:.0f} bytes"


def counted(counts: dict[str, int], total: int) -> str:
    return ", ".join(
        f"{name} {100 * n / total:.0f} %" if n < total else f"all {name}"
        for name, n in counts.items()
    )


def of_range(values: dict[str, float], unit: str = "") -> str:
    if values["min"] == values["max"]:
        return f"{values['min']:,}{unit}"
    return f"{values['min']:,} to {values['max']:,}{unit}, median {values['median']:,.0f}"


def rows_text(rows: Iterable[tuple[str, str]]) -> str:
    """Lay out (title, text) rows, the texts wrapped."""
    lines = []
    for title, text in rows:
        wrapped = textwrap.wrap(text, 104, break_on_hyphens=False, break_long_words=False) or [""]
        lines += [f"  {title:14}{wrapped[0]}", *(f"  {'':14}{line}" for line in wrapped[1:])]
    return "\n".join(lines)


def jpeg_text(jpeg: dict[str, Any]) -> str:
    known = jpeg["looked_at"] - jpeg["no_header"]
    marked = jpeg["with_restart_markers"]
    texts = [counted(jpeg[key], known) for key in ("process", "sampling") if known]
    if marked:
        share = "all" if marked == known else f"{100 * marked / known:.0f} %"
        spacing = of_range(jpeg["restart_spacing"], " px")
        texts.append(f"{share} with restart markers, every {spacing}")
    else:
        texts.append("no restart markers: a crop decodes from the top of its image")
    if jpeg["no_header"]:
        texts.append(f"{jpeg['no_header']} WITHOUT A HEADER")
    return f"{'; '.join(texts)}  (of {jpeg['looked_at']:,} that were checked)"


def label_rows(labels: dict[str, Any], classes: list[str] | None) -> list[tuple[str, str]]:
    names = [printable(name) for name in classes or []]

    def labelled(label: int) -> str:
        return f"{label} ({names[label]})" if 0 <= label < len(names) else str(label)

    if names:
        more = f", ... {names[-1]}" if len(names) > 8 else ""
        shown = f"{len(names):,}: {', '.join(names[:8])}{more}"
    else:
        shown = "no names: there is no side file, classes are numbers"
    smallest = labelled(labels["smallest"])
    largest = labelled(labels["largest"])
    per_class = of_range(labels["per_class"], " images")
    if labels["per_class"]["min"] < labels["per_class"]["max"]:
        fewest = labelled(labels["fewest"])
        most = labelled(labels["most"])
        per_class += f"; fewest: {fewest}, most: {most}"
    else:
        per_class += " each"
    rows = [
        ("classes", shown),
        ("labels", f"{smallest} to {largest}, {labels['different']:,} different"),
        ("per class", per_class),
    ]
    if labels["without_images"]:
        rows.append(("", f"{labels['without_images']:,} classes have no image"))
    return rows


def info_text(facts: dict[str, Any]) -> str:
    """The text that `info` prints."""
    image_bytes = facts["image_bytes"]
    modes = {mode: n for mode, n in facts["modes"].items() if n}
    rows = [
        ("format", f".beton version {facts['version']}, {facts['page_bytes'] / 2**20:g} MiB pages"),
        ("size", f"{amount(facts['file_bytes'])}, {facts['samples']:,} samples"),
        ("fields", ", ".join(f"{printable(f['name'])} ({f['type']})" for f in facts["fields"])),
        ("stored as", counted(modes, facts["samples"])),
        (
            "per image",
            f"{amount(image_bytes['min'])} to {amount(image_bytes['max'])}, median "
            f"{amount(image_bytes['median'])}",
        ),
        ("width", of_range(facts["width"], " px")),
        ("height", of_range(facts["height"], " px")),
    ]
    if facts["jpeg"]:
        rows.append(("jpeg", jpeg_text(facts["jpeg"])))
    if facts["labels"]:
        rows += label_rows(facts["labels"], facts["classes"])
    if facts["options"]:
        options = {k: v for k, v in facts["options"].items() if v is not None}
        rows.append(("written with", printable(", ".join(f"{k}={v}" for k, v in options.items()))))
    # Counts and lists of the side file, without those that are zero or of another type.
    noticed = [
        f"{facts['counts'][k]:,} {text}"
        for k, text in COUNTS.items()
        if isinstance(facts["counts"].get(k), int) and facts["counts"][k]
    ]
    noticed += [f"{n:,} {LISTS[key]}" for key, n in facts["noticed"].items() if n]
    if noticed:
        side_file = Path(facts["side_file"]).name
        rows.append(("noticed", f"{', '.join(noticed)}  (lists: {side_file})"))
    return f"{facts['path']}\n{rows_text(rows)}"


# ---------------------------------------------------------------- verify


def verify_all(data: BetonFile | ImageFolder, workers: int) -> dict[str, Any]:
    """The facts that `verify --json` prints.

    broken: [{index, name, reason}], sorted by index. noticed: the same for readable images.
    checksum: of all bytes, against the side file of the writer; `none` without one.
    """
    start = time.perf_counter()
    broken: list[dict] = []
    noticed: list[dict] = []
    with tqdm(total=len(data), unit=" images", disable=None, file=sys.stderr, leave=False) as bar:
        checksum = NONE
        if isinstance(data, BetonFile):
            decoded = verify_beton(data, workers, broken, bar.update)
            checksum = compare_hashes(data)
        else:
            decoded = verify_folder(data, workers, broken, noticed, bar.update)
    seconds = time.perf_counter() - start
    return {
        "path": str(data.path),
        "samples": len(data),
        "bytes": decoded,
        "broken_samples": len({entry["index"] for entry in broken}),
        "broken": sorted(broken, key=lambda entry: entry["index"]),
        "noticed": noticed,
        "checksum": checksum,
        "workers": workers,
        "seconds": round(seconds, 3),
        "images_per_s": round(len(data) / seconds, 1),
    }


def compare_hashes(data: BetonFile) -> str:
    """`matches`, `differs`, or `none`: all bytes of a .beton, as its writer left them or not."""
    written = data.written_hashes()
    if written is None:
        return NONE
    try:
        found = hash_file(data.path, written["first_page"])
    except OSError as error:
        raise BetonError(f"{data.path}: cannot be read: {error.strerror}") from error
    return MATCHES if all(found[name] == written[name] for name in found) else DIFFERS


def verify_beton(
    data: BetonFile, workers: int, broken: list[dict], done: Callable[[int], Any]
) -> int:
    """Check every image, label and value of a .beton; return the size of its images in bytes."""

    def report(index: int, reason: str) -> None:
        name = ((data.manifest or {}).get("names") or {index: ""})[index]
        broken.append({"index": index, "name": name, "reason": reason})

    if layout.INT in (kind for _, kind in data.fields):
        # Opening the file has refused labels beyond the class names already.
        for index in np.flatnonzero(data.labels < 0).tolist():
            report(index, f"label {data.labels[index]} is negative")
    others = [name for name, kind in data.fields if kind != layout.IMAGE]
    pool = _native.Pool(workers)
    out = np.empty((BATCH, SMALL, SMALL, 3), np.uint8)
    for start in range(0, len(data), BATCH):
        indices = np.arange(start, min(start + BATCH, len(data)))
        (samples,) = data.fetch(indices)
        n = len(indices)
        # Whole images, so that every byte is decoded, at a small size, which costs little.
        crops = whole_images(samples.width, samples.height)
        status = _native.decode_batch(
            pool,
            data=samples.data,
            offset=samples.offset,
            size=samples.size,
            mode=samples.mode,
            width=samples.width,
            height=samples.height,
            crops=crops,
            out=out[:n],
        )
        samples.check()
        for k in np.flatnonzero(status).tolist():
            report(int(indices[k]), _native.status_message(int(status[k])))
        for name in others:
            for index, reason in unreadable(data, name, indices):
                report(index, reason)
        done(n)
    return int(data.size.sum())


def unreadable(data: BetonFile, name: str, indices: np.ndarray) -> Iterable[tuple[int, str]]:
    """Yield (index, reason) of samples whose value of a field cannot be read."""
    # The whole batch at once; sample by sample only if it fails, to find which ones.
    try:
        data.field(name, indices)
    except BetonError:
        for index in indices:
            try:
                data.field(name, np.array([index]))
            except BetonError as error:
                yield int(index), str(error).removeprefix(f"{data.path}: ")


def verify_folder(
    data: ImageFolder,
    workers: int,
    broken: list[dict],
    noticed: list[dict],
    done: Callable[[int], Any],
) -> int:
    """Check every image of a folder, read as the writer reads it; return the size of its files in
    bytes.
    """

    def check(index: int) -> tuple[int, str, list[str]]:
        """(bytes, reason why it is broken or "", notes)"""
        try:
            content = data.read(index)
            image = decode_image(content)
        except (OSError, ValueError) as error:
            return 0, str(getattr(error, "strerror", None) or error), []
        notes = [f"{LISTS['damaged']}: {image.damage}"] if image.damage else []
        notes += [LISTS["cmyk"]] if image.cmyk else []
        if image.content != "JPEG" and data.name(index).lower().endswith((".jpg", ".jpeg")):
            notes.append(f"{LISTS['other_content']}: {image.content}")
        return len(content), "", notes

    total = 0
    with ThreadPoolExecutor(workers, "matryoshka-verify") as pool:
        try:
            # In batches, because pool.map submits all of its arguments at once.
            for start in range(0, len(data), BATCH):
                indices = range(start, min(start + BATCH, len(data)))
                for index, (size, reason, notes) in zip(
                    indices, pool.map(check, indices), strict=True
                ):
                    entry = {"index": index, "name": as_text(data.name(index))}
                    if reason:
                        broken.append(entry | {"reason": reason})
                    noticed.extend(entry | {"reason": note} for note in notes)
                    total += size
                    done(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return total


def verify_embeddings(path: str) -> dict[str, Any]:
    """The facts that `verify --json` prints about a folder of embeddings. EmbeddingError."""
    embeddings = open_embeddings(path)
    return {
        "path": path,
        "rows": len(embeddings),
        "columns": embeddings.X.shape[1],
        "dtype": str(embeddings.X.dtype),
        "checksum": MATCHES if embeddings.verify() else NONE,
    }


def embeddings_text(found: dict[str, Any]) -> str:
    what = f"{found['path']}: {found['rows']:,} x {found['columns']:,} {found['dtype']}"
    if found["checksum"] == MATCHES:
        return f"sound: {what}, all hashes match"
    return f"{what}, of an older version without hashes: only sizes and types were compared"


def verify_text(found: dict[str, Any]) -> str:
    lines = []
    for title, entries in (("noticed", found["noticed"]), ("BROKEN", found["broken"])):
        if entries:
            lines.append(f"{title}:")
        for entry in entries[:SHOWN]:
            name = f" {printable(entry['name'])}" if entry["name"] else ""
            lines.append(f"  {entry['index']:>8}{name}  {printable(entry['reason'])}")
        if len(entries) > SHOWN:
            lines.append(f"  and {len(entries) - SHOWN:,} more; --json lists all of them")
    n = found["samples"]
    bad = found["broken_samples"]
    if found["checksum"] == DIFFERS:
        lines.append(
            "BROKEN: its bytes are not those that were written (the checksum in its side file); "
            "get another copy, or write it again"
        )
    verdict = f"{bad:,} of {n:,} samples are BROKEN" if bad else f"sound: all {n:,} samples decode"
    lines.append(
        f"{found['path']}: {verdict}  ({amount(found['bytes'])} in {found['seconds']:.1f} s, "
        f"{found['images_per_s']:,.0f} images/s, {found['workers']} "
        f"thread{'s' * (found['workers'] != 1)})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
