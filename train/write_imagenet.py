"""Write a folder of images as one .beton file.

    matryoshka write photos/train train.beton
    python train/write_imagenet.py --cfg.data_dir=imagenet/train --cfg.write_path=train.beton \\
        --cfg.max_resolution=500 --cfg.write_mode=proportion --cfg.compress_probability=0.5

PHOTOS holds one folder per class. The first form means --cfg.write_mode=jpg and
--cfg.max_resolution=500 unless these are given. `--cfg.dataset=digits --cfg.split=train` needs no
image files. Class names, options and lists of problem images are written to `<write_path>.json`.
Exit status 2 if nothing could be written.
"""

import sys
import time

from tqdm import tqdm

from matryoshka.config import ConfigError, SectionParser, ShortForm, program, section_parser
from matryoshka.data import BetonError, Digits, ImageFolder, WriterConfig, write_beton
from matryoshka.data.reader import manifest_path
from matryoshka.data.sources import parts_in

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


def open_source(cfg: WriterConfig) -> ImageFolder | Digits:
    if cfg.dataset == "digits":
        if cfg.split is None:
            raise BetonError("cfg.dataset=digits needs cfg.split=train or cfg.split=val")
        return Digits(cfg.split)
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
    first = (
        f"{written:,} images of {len(manifest['classes'])} classes: {counts['jpg']:,} jpg, "
        f"{counts['raw']:,} raw"
    )
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
    source = open_source(cfg)
    start = time.perf_counter()
    # disable=None: no bar if stderr is not a terminal.
    with tqdm(total=None, unit=" images", disable=None, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        manifest = write_function(cfg)(
            source,
            cfg.write_path,
            num_workers=cfg.num_workers,
            chunk_size=cfg.chunk_size,
            progress=progress,
            **cfg.options(),
        )
    print(summary(manifest, cfg.write_path, time.perf_counter() - start))


if __name__ == "__main__":
    main()
