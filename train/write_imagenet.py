"""Write a folder of images, or a public data set, as one .beton file.

    matryoshka write photos/train train.beton
    matryoshka write --cfg.dataset=cifar10 --cfg.split=train --cfg.write_path=train.beton
    python train/write_imagenet.py --cfg.data_dir=imagenet/train --cfg.write_path=train.beton \\
        --cfg.max_resolution=500 --cfg.write_mode=proportion --cfg.compress_probability=0.5

PHOTOS holds one folder per class. The first form means --cfg.write_mode=jpg and
--cfg.max_resolution=500 unless these are given. A named set is downloaded to --cfg.cache_dir, and
stored raw at its own size; `--cfg.dataset=digits` needs no download. Class names, options and lists
of problem images are written to `<write_path>.json`. Exit status 2 if nothing could be written.
"""

import time
from functools import partial
from pathlib import Path

from matryoshka.config import ConfigError, SectionParser, ShortForm, program, section_parser
from matryoshka.data import BetonError, ImageFolder, WriterConfig, write_beton
from matryoshka.data.bars import Bars
from matryoshka.data.catalogue import FOLDER, SETS
from matryoshka.data.downloads import Progress
from matryoshka.data.named import named_source, part_of
from matryoshka.data.reader import manifest_path
from matryoshka.data.sources import parts_in
from matryoshka.data.writer import Source, check_destination

SHOWN = 10  # images that a list on the terminal names
LISTS = {  # of the manifest
    "cmyk": "CMYK, stored as RGB",
    "other_content": "named .jpg, but of another format",
    "damaged": "damaged, but readable",
    "broken": "LEFT OUT, not readable",
    "heif": "LEFT OUT, HEIC",
}
# Options that are words of the short form; what its defaults are, for photos.
WORDS = {"cfg.data_dir": "PHOTOS", "cfg.write_path": "OUT.beton"}
PHOTOS = {"cfg.max_resolution": 500, "cfg.write_mode": "jpg"}


def parser() -> SectionParser:
    return section_parser(
        "write_imagenet.py", __doc__ or "", {"cfg": WriterConfig}, ShortForm(WORDS, PHOTOS)
    )


def open_source(cfg: WriterConfig, progress: Progress) -> Source:
    if cfg.dataset not in (FOLDER, *SETS) and Path(cfg.dataset).is_dir():  # in place of a name
        folder = Path(cfg.dataset)
        folder = part_of(folder, cfg.split) if cfg.split else folder
        check_splits(str(folder))
        return ImageFolder(folder)
    if cfg.dataset != FOLDER:
        return named_source(
            cfg.dataset,
            cfg.split,
            cache=cfg.cache_dir,
            image_column=cfg.image_column,
            label_column=cfg.label_column,
            progress=progress,
        )
    if cfg.data_dir is None:
        raise BetonError(
            f"cfg.dataset={cfg.dataset} needs cfg.data_dir, the folder of class folders"
        )
    check_splits(cfg.data_dir)
    return ImageFolder(cfg.data_dir)


def check_splits(folder: str) -> None:
    """ConfigError for a folder of `train` and `val`, whose names would become the two classes."""
    parts = parts_in(folder)
    if not parts:
        return
    commands = [f"matryoshka write {folder}/{name} {name}.beton" for name in parts]
    raise ConfigError(
        f"{folder}: its folders {', '.join(parts)} are parts of a data set, not classes; write "
        f"each: {'; '.join(commands)}"
    )


def write_function(cfg: WriterConfig):
    if cfg.writer == "native":
        return write_beton
    from matryoshka.data.ffcv_backend import write_with_ffcv  # imports torch, as FFCV does

    return write_with_ffcv


def summary(manifest: dict, path: str, seconds: float) -> str:
    """The text that the program prints after writing."""
    counts = manifest["counts"]
    written = manifest["num_samples"]
    classes = manifest["classes"]
    names = "labels without names" if classes is None else f"{len(classes)} classes"
    first = f"{written:,} images of {names}: {counts['jpg']:,} jpg, {counts['raw']:,} raw"
    if "resized" in counts:  # FFCV's writer does not count them
        first += (
            f", {counts['resized']:,} reduced to {manifest['options']['max_resolution']} pixels"
        )
    lines = [first]
    if "ignored" in manifest:
        kinds = manifest["ignored"]
        each = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines.append(f"{sum(kinds.values())} other files ignored: {each}")
    for key, text in LISTS.items():
        entries = manifest.get(key, [])
        if entries:
            lines.append(f"{len(entries)} {text}:")
        for entry in entries[:SHOWN]:
            reason = f": {entry['reason']}" if "reason" in entry else ""
            lines.append(f"  {entry['name']}{reason}")
        if len(entries) > SHOWN:
            lines.append(f"  and {len(entries) - SHOWN} more, see {manifest_path(path)}")
    lines.append(
        f"{manifest['num_bytes'] / 1e6:,.1f} MB in {seconds:.1f} s, {written / seconds:,.0f} "
        "images/s"
    )
    lines.append(f"written: {path}")
    return "\n".join(lines)


@program
def main(argv=None):
    cfg = parser().parse_args(argv).cfg
    check_destination(Path(cfg.write_path))  # before a long download
    with Bars() as bars:
        source = open_source(cfg, bars)
        start = time.perf_counter()
        manifest = write_function(cfg)(
            source,
            cfg.write_path,
            num_workers=cfg.num_workers,
            chunk_size=cfg.chunk_size,
            progress=partial(bars, "write"),
            **cfg.options(),
        )
    print(summary(manifest, cfg.write_path, time.perf_counter() - start))


if __name__ == "__main__":
    main()
