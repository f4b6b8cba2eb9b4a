"""One self-contained HTML page that shows a model: accuracy by length, cascades, classes, samples,
what produced it.

    matryoshka report --run trainlogs/first --output report.html       # results.json, analysis.json, ... in the folder
    matryoshka report --results mrl.json ff8.json ff512.json v2.json --analysis analysis.json --gradcam maps/

The first of --results is the subject. Others of the same checkpoint are other test sets, those of
other checkpoints on the same images are compared with it. Nothing on the page needs a network.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from matryoshka import config
from matryoshka.evaluation import analysis
from matryoshka.evaluation.superclasses import name_of
from matryoshka.files import write_atomically
from matryoshka.report.page import MAX_IMAGE_BYTES, Answer, Evidence, Picture, Sample, render
from matryoshka.report.tables import Run, RunError, read_run, short_dims

FILES = ("results.json", "analysis.json", "baselines.json")  # looked for in --run
NEEDED = (
    "checkpoint",
    "arch",
    "head",
    "dataset",
    "data",
    "images",
    "classes",
    "resolution",
)  # of results.json
THUMBNAIL, HEAT_MAP = 160, 1500  # pixels of the longer side at most


class ReportError(ValueError):
    """A file that is not what the option says; the message names it and the remedy."""

    user_error = True


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the page shows."""

    run: str | None = config.option(
        None,
        help=f"run folder; {', '.join(FILES)} and gradcam/ in it are used unless given",
        metavar="DIR",
    )
    results: tuple[str, ...] = config.option(
        (), help="results.json of evaluations", metavar="FILE ...", words=True
    )
    analysis: str | None = config.option(None, help="analysis.json of the subject", metavar="FILE")
    baselines: str | None = config.option(
        None, help="baselines.json of the subject", metavar="FILE"
    )
    gradcam: str | None = config.option(
        None, help="folder that matryoshka gradcam wrote", metavar="DIR"
    )
    samples: int = config.option(16, help="images to show with their predictions; 0: none", low=0)
    seed: int = config.option(0, help="seed of their choice", low=0)
    title: str | None = config.option(None, help="unset: the model and its data set")
    output: str | None = config.option(
        None, help="unset: report.html in the run folder, else here", metavar="FILE"
    )


def parser() -> config.FlagParser:
    return config.flat_parser("report.py", __doc__ or "", ReportOptions)


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    run = training_run(args.run)
    found = {
        name: Path(args.run) / name
        for name in FILES
        if args.run and (Path(args.run) / name).is_file()
    }
    places = [Path(path) for path in args.results] or (
        [found["results.json"]] if "results.json" in found else []
    )
    if not places:
        where = f"{args.run}: has no results.json; " if args.run else ""
        raise ReportError(
            f"{where}give --results, or evaluate with matryoshka eval --output "
            f"{args.run or '.'}/results.json"
        )
    output = Path(args.output) if args.output else Path(args.run or "") / "report.html"
    if not output.resolve().parent.is_dir():
        raise config.ConfigError(f"--output {output}: its folder does not exist; make it first")

    results = [read(path, "prefixes", "results of matryoshka eval") for path in places]
    for path, one in zip(places, results, strict=True):
        if missing := [key for key in NEEDED if key not in one]:
            raise ReportError(
                f"{path}: not the results of matryoshka eval: it has no {missing[0]!r}"
            )
    subject = results[0]
    analysed = args.analysis or found.get("analysis.json")
    beside = args.baselines or found.get("baselines.json")
    maps = Path(args.gradcam) if args.gradcam else Path(args.run or "") / "gradcam"
    evidence = Evidence(
        title=args.title or title_of(subject),
        results=results,
        analysis=read(Path(analysed), "top1", "analysis of matryoshka analyze")
        if analysed
        else None,
        baselines=read(Path(beside), "methods", "baselines of matryoshka baselines")
        if beside
        else None,
        run=run,
        environment=read(Path(args.run) / "env.json", "versions", "environment of a run")
        if run
        else None,
    )
    if evidence.analysis is not None:
        check_same(evidence.analysis, subject, str(analysed))
    if evidence.baselines is not None and differs(
        evidence.baselines.get("checkpoint"), subject.get("checkpoint")
    ):
        raise ReportError(
            f"{beside}: is of {evidence.baselines.get('checkpoint')}, the results of "
            f"{subject.get('checkpoint')}; "
            "run matryoshka baselines on this checkpoint"
        )
    budget = MAX_IMAGE_BYTES
    if args.samples:
        budget -= add_samples(evidence, places[0], args.samples, args.seed, budget)
    if args.gradcam or (args.run and maps.is_dir()):
        add_heat_maps(evidence, maps, budget)
    page = render(evidence)
    write_atomically(output, page)
    for note in evidence.notes:
        print(f"note: {note}")
    print(f"report  {output}  ({len(page) / 1e6:.2f} MB)")
    return 0


def training_run(folder: str | None) -> Run | None:
    """None for a folder that is no run, such as that of an evaluation."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ReportError(f"--run {folder}: no such folder")
    try:
        return read_run(folder)
    except FileNotFoundError:
        return None
    except RunError as error:
        raise ReportError(f"--run {error}") from None


def read(path: Path, key: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ReportError(f"{path}: not valid JSON; expected the {what}") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), dict) or not value[key]:
        raise ReportError(f"{path}: not the {what}: it has no {key!r}")
    return value


def title_of(subject: dict[str, Any]) -> str:
    dims = short_dims([int(d) for d in subject["prefixes"]])
    name = (
        Path(subject["data"]).stem
        if subject["dataset"] == "V1"
        else f"ImageNet {subject['dataset']}"
    )
    return " ".join(filter(None, (subject["arch"], subject["head"].upper(), dims, "on", name)))


def check_same(found: dict[str, Any], subject: dict[str, Any], path: str) -> None:
    if (
        list(map(str, found.get("dims", []))) != list(subject["prefixes"])
        or found.get("images") != subject["images"]
    ):
        raise ReportError(
            f"{path}: is of {found.get('images')} images and dims {found.get('dims')}, the "
            "results of "
            f"{subject['images']} images and {[int(d) for d in subject['prefixes']]}; analyze "
            "the arrays of these"
        )

    theirs, ours = found["top1"], {d: row.get("top1") for d, row in subject["prefixes"].items()}
    if any(abs(theirs[d] - ours[d]) > 0.01 for d in ours if isinstance(theirs.get(d), float)):
        raise ReportError(
            f"{path}: its accuracies are not those of the results; analyze the arrays of these "
            "results"
        )


def differs(one: Any, other: Any) -> bool:
    """Whether two names of checkpoints are certainly not the same file; folders may have moved."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    a, b = Path(one), Path(other)
    return one != other and (a.name, a.parent.name) != (b.name, b.parent.name)


# ---------------------------------------------------------------- pictures


def address(picture: Image.Image, longest: int, quality: int = 82) -> str:
    """A data: address of the picture as JPEG; pictures of a few pixels are shown larger, with sharp
    edges.
    """
    if max(picture.size) > longest:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    elif max(picture.size) * 2 <= longest:
        factor = longest // max(picture.size)
        picture = picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def add_samples(evidence: Evidence, results: Path, count: int, seed: int, budget: int) -> int:
    """Images of each kind with the answers of all prefixes; the bytes that they take. A note where
    that cannot be.
    """
    from matryoshka.data import BetonError, CenterCrop, Loader, open_dataset
    from matryoshka.data.subset import Subset
    from matryoshka.evaluation.prediction_arrays import ArrayError, from_results

    subject = evidence.results[0]
    if not subject.get("arrays"):
        evidence.notes.append(
            "no samples: the evaluation saved no arrays (eval --save_logits --save_gt)"
        )
        return 0
    try:
        arrays = from_results(results)
        dataset = open_dataset(subject["data"])
    except (ArrayError, BetonError) as error:
        evidence.notes.append(f"no samples: {error}")
        return 0
    if len(dataset) != len(arrays.labels):
        evidence.notes.append(
            f"no samples: {subject['data']} no longer holds the {len(arrays.labels):,} images"
        )
        return 0
    chosen, first = choose(arrays, count, seed)
    crop = CenterCrop(subject["resolution"], subject.get("crop_ratio", 1.0))
    loader = Loader(Subset(dataset, chosen), 64, order="sequential", image=crop, num_workers=1)
    pixels = np.concatenate([batch.images.numpy() for batch in loader])
    names = arrays.class_names or [str(c) for c in range(arrays.num_classes)]
    said, sure = arrays.answers(chosen)
    used = 0
    for k, image in enumerate(chosen.tolist()):
        label = name_of(names[arrays.labels[image]])
        picture = Picture(address(Image.fromarray(pixels[k]), THUMBNAIL), f"an image of {label}")
        used += len(picture.address)
        if used > budget:
            break
        answers = [
            Answer(
                dim,
                name_of(names[said[g, k]]),
                float(sure[g, k]),
                bool(said[g, k] == arrays.labels[image]),
            )
            for g, dim in enumerate(arrays.dims)
        ]
        evidence.samples.append(Sample(picture, label, story(first[k], arrays.dims), answers))
    return used


def choose(arrays: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images int64 [n], their first right prefix): in turn one of each kind, so that rare ones are
    there too.
    """
    result = analysis.oracle(arrays.answers()[0], arrays.labels, arrays.dims)
    order = np.random.default_rng(seed).permutation(len(arrays.labels))
    queues = [order[result.first[order] == g].tolist() for g in range(len(arrays.dims) + 1)]
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    picked = np.array(sorted(chosen[:count], key=lambda i: (result.first[i], i)), np.int64)
    return picked, result.first[picked]


def story(first: int, dims: Sequence[int]) -> str:
    if first == len(dims):
        return "never right"
    return "right from the start" if first == 0 else f"first right with {dims[first]} dimensions"


def add_heat_maps(evidence: Evidence, folder: Path, budget: int) -> None:
    """The montages of gradcam.json, as many as there is room for."""
    try:
        entries = json.loads((folder / "gradcam.json").read_text(encoding="utf-8"))
        names = [(str(entry["file"]), str(entry["image"])) for entry in entries]
    except FileNotFoundError:
        raise ReportError(
            f"--gradcam {folder}: has no gradcam.json; make one with matryoshka gradcam"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ReportError(
            f"{folder / 'gradcam.json'}: damaged; make it again with matryoshka gradcam"
        ) from None
    for number, (file, name) in enumerate(names):
        if (
            Path(file).name != file or "\0" in file
        ):  # nothing outside of the folder gets onto the page
            raise ReportError(
                f"{folder / 'gradcam.json'}: {file!r} is not the name of a picture in that folder"
            )
        try:
            with Image.open(folder / file, formats=("PNG", "JPEG")) as picture:
                shown = Picture(address(picture, HEAT_MAP), name)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ReportError(f"{folder / file}: cannot be read: {error}") from None
        budget -= len(shown.address)
        if budget < 0:
            evidence.notes.append(
                f"{number} of {len(names)} Grad-CAM pictures: the others are in {folder}"
            )
            break
        evidence.heat_maps.append(shown)


if __name__ == "__main__":
    raise SystemExit(main())
