"""Self-contained HTML report of a model: accuracy by length, analyses, samples, provenance.

    matryoshka report trainlogs/first
    matryoshka report --results mrl.json ff8.json ff512.json v2.json --analysis analysis.json \\
        --gradcam maps/

A run's results.json, analysis.json, baselines.json, dims/dims.json, gradcam/ and embeddings/ are
used. A self-supervised run needs no results: its log has the curves of every prefix. The first
file of --results is the subject. Results of the same checkpoint are shown as other test sets,
results of other checkpoints on the same images as models to compare with. The page needs no
network.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from matryoshka import config
from matryoshka.config.limits import MAX_COUNT, MAX_SEED
from matryoshka.data.imagenet import FOLDERS
from matryoshka.embeddings.reading import META
from matryoshka.evaluation import analysis
from matryoshka.evaluation.superclasses import name_of
from matryoshka.files import check_regular, read_regular, write_atomically
from matryoshka.report import Run, RunError, read_run, short_dims
from matryoshka.report.dims import dims_table
from matryoshka.report.page import (
    MAX_IMAGE_BYTES,
    Answer,
    Evidence,
    Neighbour,
    Neighbours,
    Picture,
    Sample,
    render,
)
from matryoshka.report.page.ssl_sections import method_of

# Searched in the run folder.
FILES = ("results.json", "analysis.json", "baselines.json")
DIMS = "dims/dims.json"
REQUIRED_KEYS = (
    "checkpoint",
    "arch",
    "head",
    "dataset",
    "data",
    "images",
    "classes",
    "resolution",
)  # of results.json
DIMS_KEYS = (*REQUIRED_KEYS, "dims", "class_names", "loss", "macs", "costs", "confused")
PARTS = ("train", "val", "test")  # folders of a data set
THUMBNAIL, HEAT_MAP, NEIGHBOUR = 160, 1500, 96  # maximum length of the longer side, in pixels
SHOWN_DIMS = (8, 64)  # prefixes whose neighbours are shown, beside the whole embedding
NEAREST = 5  # neighbours shown of each
MOST_NEIGHBOURS = 24  # images with neighbours: 24 x 16 pictures are a megabyte


class ReportError(ValueError):
    """An input file that is not what its option expects; the message names it and the remedy."""

    user_error = True


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Inputs of the page."""

    folder: str | None = config.option(
        None,
        help=f"run folder; {', '.join(FILES)}, {DIMS}, gradcam/ and embeddings/ in it are used "
        "unless given",
        metavar="RUN",
        positional=True,
        existing=True,
    )
    run: str | None = config.option(None, help="the same as RUN", metavar="DIR", file_name=True)
    results: tuple[str, ...] = config.option(
        (), help="results.json of evaluations", metavar="FILE ...", words=True, file_name=True
    )
    analysis: str | None = config.option(
        None, help="analysis.json of the subject", metavar="FILE", file_name=True
    )
    baselines: str | None = config.option(
        None, help="baselines.json of the subject", metavar="FILE", file_name=True
    )
    dims: str | None = config.option(
        None,
        help="dims.json that matryoshka dims wrote, of the subject",
        metavar="FILE",
        file_name=True,
    )
    gradcam: str | None = config.option(
        None, help="folder that matryoshka gradcam wrote", metavar="DIR", file_name=True
    )
    embeddings: str | None = config.option(
        None,
        help="folder of matryoshka embed: shows the nearest images of some of them; unset: "
        "embeddings/ in the run folder",
        metavar="DIR",
        existing=True,
    )
    samples: int = config.option(
        16, help="images to show with their predictions; 0: none", low=0, high=MAX_COUNT
    )
    seed: int = config.option(0, help="seed of their choice", low=0, high=MAX_SEED)
    title: str | None = config.option(None, help="unset: the model and its data set")
    output: str | None = config.option(
        None, help="unset: report.html in the run folder, else here", metavar="FILE"
    )


def parser() -> config.FlagParser:
    return config.flat_parser("report.py", __doc__ or "", ReportOptions)


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.folder and args.run:
        raise config.ConfigError(f"{args.folder} and --run {args.run}: give one run folder")
    args.run = args.run or args.folder

    # ---- input files ----
    run = training_run(args.run)
    in_run = files_in_run(args.run)
    dims_file = args.dims or in_run.get(DIMS)
    results_files = [Path(path) for path in args.results]
    if not results_files and "results.json" in in_run:
        results_files = [in_run["results.json"]]
    if not results_files and dims_file:
        results_files = [Path(dims_file)]
    ssl_method = method_of(run)
    if not results_files and ssl_method is None:
        problem = f"{args.run}: has no results.json of an evaluation; " if args.run else ""
        raise ReportError(
            f"{problem}give --results, or evaluate with matryoshka eval --output "
            f"{args.run or '.'}/results.json, or matryoshka dims --path {args.run or 'RUN'}"
        )
    analysis_file = args.analysis or in_run.get("analysis.json")
    baselines_file = args.baselines or in_run.get("baselines.json")
    heat_maps = Path(args.gradcam) if args.gradcam else Path(args.run or "") / "gradcam"
    output = Path(args.output) if args.output else Path(args.run or "") / "report.html"
    if not output.resolve().parent.is_dir():
        raise config.ConfigError(f"--output {output}: its folder does not exist; make it first")

    # ---- numbers ----
    results = [read_results(path) for path in results_files]
    subject = results[0] if results else {}
    title = args.title or (title_of(subject) if results or run is None else title_of_run(run))
    evidence = Evidence(title=title, results=results, run=run)
    if analysis_file:
        evidence.analysis = read_json(Path(analysis_file), "top1", "analysis of matryoshka analyze")
        if not results:
            raise ReportError(f"{analysis_file}: give the --results that it analyses as well")
        check_analysis(evidence.analysis, subject, str(analysis_file))
    if baselines_file:
        evidence.baselines = read_json(
            Path(baselines_file), "methods", "baselines of matryoshka baselines"
        )
        check_baselines(evidence.baselines, subject, str(baselines_file))
    if dims_file:
        evidence.dims = read_results(Path(dims_file), DIMS_KEYS, "results of matryoshka dims")
        check_dims(evidence.dims, subject, str(dims_file))
    if run:
        evidence.environment = read_json(
            Path(args.run) / "env.json", "versions", "environment of a run"
        )

    # ---- pictures ----
    budget = MAX_IMAGE_BYTES  # for samples and heat maps together
    # dims.json never has arrays: no note on that.
    if args.samples and results and "costs" not in subject:
        budget -= add_samples(evidence, results_files[0], args.samples, args.seed, budget)
    if args.gradcam or (args.run and heat_maps.is_dir()):
        add_heat_maps(evidence, heat_maps, budget)
    embeddings = args.embeddings or Path(args.run or "") / "embeddings"
    if args.samples and (args.embeddings or (args.run and (embeddings / META).is_file())):
        add_neighbours(evidence, embeddings, args.samples, args.seed)

    page = render(evidence)
    write_atomically(output, page)
    if evidence.dims:
        print(dims_table(evidence.dims))
    for note in evidence.notes:
        print(f"note: {note}")
    print(f"report  {output}  ({len(page) / 1e6:.2f} MB)")
    return 0


# ---------------------------------------------------------------- input files


def training_run(folder: str | None) -> Run | None:
    """Read the run folder; None for a folder without a training run, e.g. of an evaluation."""
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


def files_in_run(folder: str | None) -> dict[str, Path]:
    """The JSON files that exist in the run folder."""
    if not folder:
        return {}
    found = {}
    for name in (*FILES, DIMS):
        path = Path(folder) / name
        if path.is_file() and not (name == FILES[0] and is_of_training(path)):
            found[name] = path
    return found


def is_of_training(results: Path) -> bool:
    """Whether a results.json is of train_cifar10.py or train_ssl.py, not an evaluation's."""
    try:
        value = json.loads(read_regular(results))
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(value, dict)
        and "prefixes" not in value
        and bool({"test", "method"} & value.keys())
    )


def read_json(path: Path, key: str, what: str) -> dict[str, Any]:
    """Read a JSON object with a non-empty object under `key`. what: its name in errors."""
    try:
        value = json.loads(read_regular(path))
    except (ValueError, RecursionError):
        raise ReportError(f"{path}: not valid JSON; expected the {what}") from None
    if not isinstance(value, dict) or not isinstance(value.get(key), dict) or not value[key]:
        raise ReportError(f"{path}: not the {what}: {key!r} is missing")
    return value


def read_results(
    path: Path,
    keys: Sequence[str] = REQUIRED_KEYS,
    what: str = "results of matryoshka eval",
) -> dict[str, Any]:
    results = read_json(path, "prefixes", what)
    for key in keys:
        if key not in results:
            raise ReportError(f"{path}: not the {what}: {key!r} is missing")
    return results


def title_of(subject: Mapping[str, Any]) -> str:
    dims = short_dims([int(d) for d in subject["prefixes"]])
    if subject["dataset"] == "V1":
        path = Path(subject["data"])
        # photos/test is a part of the photos
        data = path.parent.name if path.name in PARTS and path.parent.name else path.stem
    elif subject["dataset"] in FOLDERS:
        data = f"ImageNet {subject['dataset']}"
    else:
        data = subject["dataset"]
    words = [subject["arch"], subject["head"].upper(), dims, "on", data]
    return " ".join(word for word in words if word)


def title_of_run(run: Run) -> str:
    """Method, backbone, prefixes and data set of a self-supervised run."""
    path = run.params.get("data.dataset") or run.params.get("data.train_dataset") or ""
    data = Path(str(path))
    name = data.parent.name if data.name in PARTS and data.parent.name else data.stem
    words = [method_of(run), run.arch, short_dims(run.dims), "on" if name else "", name]
    return " ".join(word for word in words if word)


def check_analysis(found: Mapping[str, Any], subject: Mapping[str, Any], path: str) -> None:
    """Check that an analysis belongs to the subject: images, prefixes and accuracies agree."""
    dims = [str(d) for d in found.get("dims", [])]
    if dims != list(subject["prefixes"]) or found.get("images") != subject["images"]:
        raise ReportError(
            f"{path}: is of {found.get('images')} images and dims {found.get('dims')}, the "
            f"results of {subject['images']} images and {[int(d) for d in subject['prefixes']]}; "
            "analyze the arrays of these results"
        )
    for dim, row in subject["prefixes"].items():
        analysed = found["top1"].get(dim)
        # 0.01: both are rounded.
        if isinstance(analysed, float) and abs(analysed - row.get("top1")) > 0.01:
            raise ReportError(
                f"{path}: its accuracies differ from those of the results; analyze the arrays of "
                "these results"
            )


def check_baselines(found: Mapping[str, Any], subject: Mapping[str, Any], path: str) -> None:
    """Check that baselines are of the subject's checkpoint."""
    baseline_checkpoint = found.get("checkpoint")
    subject_checkpoint = subject.get("checkpoint")
    if certainly_differ(baseline_checkpoint, subject_checkpoint):
        raise ReportError(
            f"{path}: is of {baseline_checkpoint}, the results of {subject_checkpoint}; run "
            "matryoshka baselines on this checkpoint"
        )


def check_dims(found: Mapping[str, Any], subject: Mapping[str, Any], path: str) -> None:
    """Check that dims.json is of the subject's images and dims."""
    if found["images"] != subject["images"] or not set(subject["prefixes"]) & set(found["macs"]):
        raise ReportError(
            f"{path}: is of {found['images']} images and dims {found['dims']}, the results of "
            f"{subject['images']} images and {[int(d) for d in subject['prefixes']]}; run "
            "matryoshka dims on the same model and images"
        )


def certainly_differ(first: Any, second: Any) -> bool:
    """Whether two checkpoints have different file or folder names; their parents may have moved."""
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    if first == second:
        return False
    a, b = Path(first), Path(second)
    return (a.name, a.parent.name) != (b.name, b.parent.name)


# ---------------------------------------------------------------- pictures


def data_url(picture: Image.Image, longest: int, quality: int = 82) -> str:
    """The picture as a JPEG data: URL, at most `longest` pixels on its longer side.

    Small pictures are enlarged by a whole factor, with sharp pixels.
    """
    if max(picture.size) > longest:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    elif max(picture.size) * 2 <= longest:
        factor = longest // max(picture.size)
        size = (picture.width * factor, picture.height * factor)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def add_samples(evidence: Evidence, results: Path, count: int, seed: int, budget: int) -> int:
    """Add images with the predictions of all prefixes; return the bytes they use.

    If arrays or images are unavailable, adds a note instead.
    """
    from matryoshka.data import BetonError, open_dataset
    from matryoshka.evaluation.prediction_arrays import ArrayError, from_results

    # ---- arrays and images ----
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

    # ---- choose images; their predictions and pixels ----
    predictions, _ = arrays.answers()
    first = analysis.oracle(predictions, arrays.labels, arrays.dims).first
    chosen = analysis.draw_by_first_right(first, len(arrays.dims) + 1, count, seed)
    predictions, confidences = arrays.answers(chosen)
    crop = {"size": subject["resolution"], "ratio": subject.get("crop_ratio", 1.0)}
    pixels = pixels_of(dataset, chosen, crop)
    names = arrays.class_names or [str(c) for c in range(arrays.num_classes)]

    # ---- one card per image, until the budget is spent ----
    used = 0
    for k, image in enumerate(chosen.tolist()):
        label = arrays.labels[image]
        name = name_of(names[label])
        picture = Picture(data_url(Image.fromarray(pixels[k]), THUMBNAIL), f"an image of {name}")
        used += len(picture.address)
        if used > budget:
            break
        answers = []
        for g, dim in enumerate(arrays.dims):
            predicted = predictions[g, k]
            answers.append(
                Answer(
                    dim=dim,
                    prediction=name_of(names[predicted]),
                    confidence=float(confidences[g, k]),
                    right=bool(predicted == label),
                )
            )
        outcome = outcome_text(int(first[image]), arrays.dims)
        evidence.samples.append(Sample(picture, name, outcome, answers))
    return used


def add_neighbours(evidence: Evidence, folder: str | Path, count: int, seed: int) -> None:
    """Add images and their nearest ones with prefixes of three lengths.

    If the images are unavailable, adds a note instead. EmbeddingError for a folder without
    embeddings.
    """
    from matryoshka.data import BetonError
    from matryoshka.data.sources import open_images
    from matryoshka.embeddings import open_embeddings
    from matryoshka.retrieval.exact import exact_search

    embeddings = open_embeddings(folder)
    try:
        dataset = open_images([embeddings.meta["data"]["path"]])
    except BetonError as error:
        evidence.notes.append(f"no neighbours: {error}")
        return
    if len(dataset) != len(embeddings) or len(embeddings) <= NEAREST:
        evidence.notes.append(
            f"no neighbours: {dataset.path} has {len(dataset):,} images, {folder} "
            f"{len(embeddings):,}; needs as many, and more than {NEAREST}"
        )
        return

    # ---- neighbours, without the image itself ----
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(embeddings), min(count, MOST_NEIGHBOURS, len(embeddings)), replace=False)
    drawn.sort()
    width = embeddings.X.shape[1]
    dims = [*(d for d in SHOWN_DIMS if d < width), width]
    queries = np.asarray(embeddings.X[drawn])
    nearest: dict[tuple[int, int], list[int]] = {}  # by image and dim
    for dim in dims:
        found = exact_search(embeddings.X, queries, dim, NEAREST + 1).ids.tolist()
        for image, ids in zip(drawn.tolist(), found, strict=True):
            # A missing result is negative.
            nearest[image, dim] = [row for row in ids if row not in (image, -1)][:NEAREST]

    # ---- pictures, each read once ----
    rows = set(drawn.tolist()).union(*nearest.values())
    shown = np.array(sorted(rows))
    pixels = pixels_of(dataset, shown, embeddings.meta["preprocessing"])
    has_classes = embeddings.meta["data"]["num_classes"] > 0
    names = embeddings.classes
    labels = np.asarray(embeddings.y)
    pictures = {}
    for row, image in zip(shown.tolist(), pixels, strict=True):
        text = name_of(names[labels[row]]) if has_classes and names else embeddings.ids[row]
        pictures[row] = Picture(data_url(Image.fromarray(image), NEIGHBOUR), text)
    for image in drawn.tolist():
        by_dim = []
        for dim in dims:
            images = []
            for row in nearest[image, dim]:
                same = bool(labels[row] == labels[image]) if has_classes else None
                images.append(Neighbour(pictures[row], same))
            by_dim.append((dim, images))
        evidence.neighbours.append(Neighbours(pictures[image], pictures[image].text, by_dim))


def pixels_of(dataset, rows: np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """Some images as the encoder saw them, uint8 [N, S, S, 3]."""
    from matryoshka.data import CenterCrop, Loader
    from matryoshka.data.subset import Subset

    crop = CenterCrop(preprocessing["size"], preprocessing["ratio"])
    loader = Loader(Subset(dataset, rows), 64, order="sequential", crop=crop, num_workers=1)
    return np.concatenate([batch.images.numpy() for batch in loader])


def outcome_text(first: int, dims: Sequence[int]) -> str:
    """The first right prefix, number `first`, in words."""
    if first == len(dims):
        return "never right"
    if first == 0:
        return f"right with the shortest prefix, {dims[0]}"
    return f"first right with prefix {dims[first]}"


def layer_text(entry: Mapping[str, Any]) -> str:
    """The layer of heat maps and its size; empty for files of older versions."""
    if "layer" not in entry:
        return ""
    height, width = entry["positions"]
    return f"Maps of {entry['layer']}, {height} x {width} positions."


def add_heat_maps(evidence: Evidence, folder: Path, budget: int) -> None:
    """Add the montages listed in gradcam.json, as many as fit into `budget` bytes."""
    index = folder / "gradcam.json"
    try:
        entries = json.loads(read_regular(index))
        names = [(str(entry["file"]), str(entry["image"])) for entry in entries]
        evidence.heat_map_layer = layer_text(entries[0]) if entries else ""
    except FileNotFoundError:
        raise ReportError(
            f"--gradcam {folder}: has no gradcam.json; make one with matryoshka gradcam"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ReportError(f"{index}: damaged; make it again with matryoshka gradcam") from None

    for number, (file, name) in enumerate(names):
        # No file outside the folder may get onto the page.
        if Path(file).name != file or "\0" in file:
            raise ReportError(f"{index}: {file!r} is not the name of a picture in that folder")
        try:
            check_regular(folder / file)
            with Image.open(folder / file, formats=("PNG", "JPEG")) as picture:
                shown = Picture(data_url(picture, HEAT_MAP), name)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ReportError(f"{folder / file}: cannot be read: {error}") from None
        budget -= len(shown.address)
        if budget < 0:
            evidence.notes.append(
                f"shows {number} of {len(names)} Grad-CAM pictures; the others are in {folder}"
            )
            break
        evidence.heat_maps.append(shown)


if __name__ == "__main__":
    raise SystemExit(main())
