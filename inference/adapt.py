"""Good prefixes for the embeddings of any frozen encoder: fit a map behind it, in minutes on a CPU.

    matryoshka adapt --embeddings embeddings/photos --output adapters/photos
    matryoshka adapt --embeddings clip --dims 16,64,256 --loss similarity --output adapters/clip
    matryoshka embed --path model.safetensors --data photos --output embeddings/short \\
        --adapter adapters/photos/adapter.safetensors

The embeddings are split into three parts. The map is trained on the first; the second ends the
training, and decides whether the map is better than plain PCA, which is the adapter otherwise; the
table comes from the third, where each embedding searches all others. Writes adapter.safetensors,
accuracy.png and results.json to --output. docs/adapters.md describes the method and the files.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from matryoshka import config
from matryoshka.training.adapter_options import adapt_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np
import torch

from matryoshka.checkpoint.adapter_file import save_adapter
from matryoshka.environment import environment
from matryoshka.evaluation.leave_one_out import Panel, difference_of_means, interval_of_mean
from matryoshka.files import check_writable, write_atomically
from matryoshka.models.adapter import Adapter, AdapterError, AdapterSpec, random_adapter
from matryoshka.nested import check_dims, default_dims
from matryoshka.report.plots import plot_methods
from matryoshka.training.adapter import (
    SUPERVISED,
    AdapterTraining,
    Fitted,
    fit_adapter,
    rate_of,
    temperature_of,
)
from matryoshka.training.adapter_data import Given, Parts, read_input, split
from matryoshka.training.run_lock import RunLock

ADAPTER = "adapter.safetensors"
PLOT = "accuracy.png"
RESULTS = "results.json"
# Queries of each epoch's score, of the choice and of the table; each searches the whole part.
EPOCH_QUERIES = 2000
QUERIES = 10_000
# The metrics of a table: attribute of Scores, and title.
METRICS = {
    "right_1nn": "1-NN %",
    "right_knn": "kNN %, 20 neighbours",
    "precision": "mAP@10 %",
    "recall": "recall of the 10 nearest by the original full width, %",
}


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    report = partial(print, flush=True)
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    remedy = "wait for its end, or give another --output"
    with RunLock(Path(args.output), remedy=remedy):
        check(args)  # again: another start may have written there in the meantime
        fit_and_write(args, report)
    return 0


def fit_and_write(args: SimpleNamespace, report: Callable[[str], None]) -> None:
    """Read the embeddings, fit the map, choose, and write the files."""
    # ---- everything that can be refused, before work that takes time ----
    given = read_input(args.embeddings, args.labels)
    settings = settings_of(args, given)
    spec = spec_of(args, given)
    parts = split(
        given.labels,
        len(given.rows),
        args.split,
        validation=args.validation,
        test=args.test,
        seed=args.seed,
    )
    report("\n".join(summary(args, given, parts, settings)))

    # ---- training and choice ----
    started = time.perf_counter()
    labels = given.labels if settings.loss in SUPERVISED else None
    by_epoch = panel(given, parts.validation, spec, EPOCH_QUERIES, labels)
    fitted = fit_adapter(
        np.asarray(given.rows[parts.train]),
        None if labels is None else labels[parts.train],
        spec,
        settings,
        score=by_epoch.score,
        report=report,
    )
    seconds = {"training": round(time.perf_counter() - started, 2)}
    choice = choose(fitted, panel(given, parts.validation, spec, QUERIES, labels))
    report(choice.text)

    # ---- the third part ----
    started = time.perf_counter()
    tested = panel(given, parts.test, spec, QUERIES, given.labels)
    rows = {
        "raw prefix": tested.scores(None),
        "PCA": tested.scores(fitted.pca),
        "random rotation": tested.scores(random_adapter(spec, args.seed)),
    }
    if choice.adapter is fitted.pca and not fitted.is_pca:
        rows["learnt map, not chosen"] = tested.scores(fitted.adapter)
    rows["adapter"] = tested.scores(choice.adapter)
    metrics = {
        key: title for key, title in METRICS.items() if getattr(rows["PCA"], key) is not None
    }
    tables = {key: rows_of(rows, key, spec.dims) for key in metrics}
    for key, title in metrics.items():
        report("\n" + format_table(tables[key], title, spec.dims))
    seconds["evaluation"] = round(time.perf_counter() - started, 2)

    # ---- files; results.json comes last, and never describes other files ----
    results = {
        "embeddings": str(given.path),
        "rows": len(given.rows),
        "width": spec.width,
        "dims": list(spec.dims),
        "classes": None if given.labels is None else len(np.unique(given.labels)),
        "parts": {name: len(part) for name, part in parts._asdict().items()},
        "split": args.split,
        "map": spec.map_name,
        "hidden": spec.hidden,
        "settings": asdict(settings)
        | {"lr": rate_of(settings), "temperature": temperature_of(settings)},
        "chosen": choice.adapter.spec.method,
        "choice": choice.facts,
        "best_epoch": fitted.best_epoch,
        "history": fitted.history,
        "queries": len(tested.own),
        "metrics": tables,
        "seconds": seconds,
        "environment": environment(),
    }
    write(args, choice, results, metrics)


# ---------------------------------------------------------------- options


def check(args: SimpleNamespace) -> None:
    """ConfigError for options that contradict each other, and a folder that takes no files."""
    if args.validation + args.test >= 1:
        raise config.ConfigError(
            f"--validation {args.validation:g}, --test {args.test:g}: leave nothing to train on; "
            "together less than 1"
        )
    if args.hidden and args.map != "residual":
        raise config.ConfigError("--hidden is the network's of --map residual; add it")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise config.ConfigError(f"--output {output}: is a file, not a folder")
    for name in (ADAPTER, RESULTS):
        if (output / name).exists() and not args.overwrite:
            raise config.ConfigError(
                f"{output / name}: exists; choose another --output, or add --overwrite"
            )
    try:
        check_writable(output)
    except OSError as error:
        raise config.ConfigError(f"--output {output}: {error.strerror}") from None


def settings_of(args: SimpleNamespace, given: Given) -> AdapterTraining:
    """The settings of the training. ConfigError or AdapterError where labels are missing."""
    loss = args.loss
    if loss == "auto":
        loss = "neighbours" if given.labels is None else "nca"
    if given.labels is None:
        needed = f"--loss {loss}" if loss in SUPERVISED else ""
        needed = "--split classes" if args.split == "classes" else needed
        if needed:
            raise config.ConfigError(
                f"{needed}: needs labels, and {given.path} has none; give --labels"
            )
    elif (loss in SUPERVISED or args.split == "classes") and len(np.unique(given.labels)) < 2:
        raise AdapterError(
            f"{args.labels or given.path}: has one class only; labels that tell nothing: "
            "--loss neighbours fits without them"
        )
    if args.temperature is not None and loss == "similarity":
        raise config.ConfigError("--temperature: --loss similarity has none; leave it out")
    return AdapterTraining(
        loss=loss,
        epochs=args.epochs,
        patience=args.patience,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        temperature=args.temperature,
        neighbours=args.neighbours,
        seed=args.seed,
    )


def spec_of(args: SimpleNamespace, given: Given) -> AdapterSpec:
    """The adapter to fit. ConfigError for prefixes beyond the width."""
    width = given.rows.shape[1]
    try:
        dims = check_dims(args.dims, width) if args.dims else default_dims(width, min(8, width))
    except ValueError as error:
        raise config.ConfigError(f"--dims: {error} ({given.path})") from None
    hidden = (args.hidden or dims[-1]) if args.map == "residual" else 0
    return AdapterSpec(width, dims, hidden, encoder=given.encoder)


def summary(
    args: SimpleNamespace, given: Given, parts: Parts, settings: AdapterTraining
) -> list[str]:
    """Lines about the input."""
    classes = "without classes"
    if given.labels is not None:
        classes = f"of {len(np.unique(given.labels)):,} classes"
    how = f"{args.map} map, loss {settings.loss}"
    if given.labels is not None and settings.loss not in SUPERVISED:
        how += "; the labels are used in the table only"
    shared = "by whole classes" if args.split == "classes" else "at random"
    return [
        f"{given.path}: {len(given.rows):,} embeddings of {given.rows.shape[1]:,} numbers, "
        f"{classes}",
        f"parts {shared}: {len(parts.train):,} to train, {len(parts.validation):,} to choose, "
        f"{len(parts.test):,} for the table",
        f"{how}, {torch.get_num_threads()} threads",
    ]


# ---------------------------------------------------------------- choice


def panel(
    given: Given, part: np.ndarray, spec: AdapterSpec, queries: int, labels: np.ndarray | None
) -> Panel:
    """One part as the database of a comparison, and some of its rows as the queries."""
    return Panel(
        np.asarray(given.rows[part], np.float32),
        None if labels is None else labels[part],
        spec.dims,
        queries,
    )


class Choice(NamedTuple):
    """The adapter that is written, why, and the same as facts for results.json."""

    adapter: Adapter
    text: str
    facts: dict[str, Any]


def choose(fitted: Fitted, validation: Panel) -> Choice:
    """The learnt map if it is better than PCA on the validation part beyond chance, else PCA."""
    if fitted.is_pca:
        text = "adapter: PCA; no epoch of the training was better on the validation part"
        return Choice(fitted.pca, text, {"difference": None, "metric": validation.metric})
    learnt = validation.scores(fitted.adapter).main
    pca = validation.scores(fitted.pca).main
    # The mean over the prefixes of each query: the prefixes of one query are not independent.
    difference = difference_of_means(learnt.mean(0), pca.mean(0))
    measured = (
        f"{difference.mean:+.2f} points ({difference.low:+.2f} to {difference.high:+.2f}) of "
        f"{validation.metric} over PCA on the validation part, the mean of all prefixes"
    )
    facts = {"difference": difference._asdict(), "metric": validation.metric}
    if difference.low > 0:
        return Choice(
            fitted.adapter, f"adapter: the map of epoch {fitted.best_epoch}, {measured}", facts
        )
    return Choice(fitted.pca, f"adapter: PCA; the learnt map has {measured}", facts)


# ---------------------------------------------------------------- output


def rows_of(
    rows: Mapping[str, Any], key: str, dims: Sequence[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """One metric as {method: {prefix: percent, its interval, and the difference to PCA}}."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name, scores in rows.items():
        table[name] = {}
        for g, dim in enumerate(dims):
            values = getattr(scores, key)[g]
            cell: dict[str, Any] = interval_of_mean(values)._asdict()
            if name != "PCA":
                cell["over_pca"] = difference_of_means(
                    values, getattr(rows["PCA"], key)[g]
                )._asdict()
            table[name][str(dim)] = cell
    return table


def format_table(
    table: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str, dims: Sequence[int]
) -> str:
    """Methods x prefixes in percent, and the adapter's difference to PCA with its 95 % interval."""
    keys = [str(dim) for dim in dims]
    lines = [[title, *keys]]
    for name, cells in table.items():
        lines.append([name, *(f"{cells[key]['mean']:.2f}" for key in keys)])
    over = [table["adapter"][key]["over_pca"] for key in keys]
    lines.append(["  over PCA", *(f"{cell['mean']:+.2f}" for cell in over)])
    lines.append(["  95 %, from", *(f"{cell['low']:+.2f}" for cell in over)])
    lines.append(["  to", *(f"{cell['high']:+.2f}" for cell in over)])
    first = max(len(line[0]) for line in lines)
    aligned = []
    for name, *cells in lines:
        aligned.append(name.ljust(first) + "".join(cell.rjust(8) for cell in cells))
    return "\n".join(aligned)


def write(
    args: SimpleNamespace, choice: Choice, results: dict[str, Any], metrics: Mapping[str, str]
) -> None:
    """Write the files of --output. All of them are made before the first is written."""
    key, title = next(iter(metrics.items()))
    curves = {}
    for name, cells in results["metrics"][key].items():
        curves[name] = {
            int(dim): (cell["mean"], cell["low"], cell["high"]) for dim, cell in cells.items()
        }
    picture = io.BytesIO()
    part = f"{results['queries']:,} embeddings that nothing was fitted to"
    plot_methods(picture, curves, title, part)
    about = {name: results[name] for name in ("settings", "chosen", "choice", "rows", "parts")}
    text = (json.dumps(results, indent=1) + "\n").encode()

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).unlink(missing_ok=True)
    save_adapter(output / ADAPTER, choice.adapter, about)
    write_atomically(output / PLOT, picture.getvalue())
    write_atomically(output / RESULTS, text)
    print(f"\nwritten  {output}: {ADAPTER}, {PLOT}, {RESULTS}")


if __name__ == "__main__":
    raise SystemExit(main())
