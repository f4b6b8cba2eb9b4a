"""The results of `matryoshka dims` (dims.json) as text and as CSV.

dims.json has the keys of `matryoshka eval`'s results (prefixes, dims, macs, images, ...), and

    loss       {dim: mean cross-entropy}
    costs      {dim: {file, parameters, bytes, seconds: {batch size: of a forward pass}}}
    threads    of the latency; device, blocks
    confusion  {dim: [C][C] images, by true and predicted class}; empty for many classes
    confused   {dim: [[true, predicted, images], ...]}, the most frequent errors
    map        {method, labels [n], points: {dim: [n][2]}}; null without maps
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matryoshka.report.tables import wilson_interval

Json = Mapping[str, Any]

COLUMNS = (
    "dim",
    "top1",
    "top1_low",
    "top1_high",
    "top5",
    "loss",
    "parameters",
    "multiply_adds",
    "bytes",
)


def dims_rows(found: Json) -> list[dict[str, Any]]:
    """A row for each dim: COLUMNS, and `ms_at_<batch size>` where latency was measured."""
    rows = []
    for dim, row in found["prefixes"].items():
        cost = found["costs"][dim]
        low, high = wilson_interval(row["top1"], found["images"])
        values = {
            "dim": int(dim),
            "top1": row["top1"],
            "top1_low": low,
            "top1_high": high,
            "top5": row["top5"],
            "loss": found["loss"][dim],
            "parameters": cost["parameters"],
            "multiply_adds": found["macs"][dim],
            "bytes": cost["bytes"],
        }
        for batch, seconds in cost["seconds"].items():
            values[f"ms_at_{batch}"] = 1000 * seconds
        rows.append(values)
    return rows


def dims_csv(found: Json) -> str:
    """The rows as CSV, with a header."""
    rows = dims_rows(found)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def dims_table(found: Json) -> str:
    """The rows as text, with a line on how the latency was measured."""
    rows = dims_rows(found)
    batches = batch_sizes(found)
    titles = ["dim", "top-1 %", "95 % interval", "top-5 %", "loss", "parameters", "mult-adds"]
    titles += ["file", *(f"ms, {batch}" for batch in batches)]
    lines = [titles]
    for row in rows:
        cells = [
            str(row["dim"]),
            f"{row['top1']:.2f}",
            f"{row['top1_low']:.1f} to {row['top1_high']:.1f}",
            f"{row['top5']:.2f}",
            f"{row['loss']:.3f}",
            in_short(row["parameters"]),
            in_short(row["multiply_adds"]),
            f"{in_short(row['bytes'])}B",
        ]
        cells += [milliseconds(row[f"ms_at_{batch}"]) for batch in batches]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    text = ["  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in lines]
    if batches:
        text.append(latency_note(found))
    return "\n".join(text)


def latency_note(found: Json) -> str:
    """How the latency was measured, in a sentence."""
    batches = " and ".join(str(batch) for batch in batch_sizes(found))
    threads = f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    return (
        f"ms: a forward pass of {batches} images on the {found['device'].upper()} with {threads}, "
        f"the median of {found['blocks']} blocks"
    )


def batch_sizes(found: Json) -> list[int]:
    """Of the latency, in rising order."""
    first = next(iter(found["costs"].values()))
    return sorted(int(batch) for batch in first["seconds"])


def costs_differ(found: Json) -> bool:
    """Whether the multiply-adds of the dims differ by more than the classifier does."""
    macs = list(found["macs"].values())
    return max(macs) > 1.1 * min(macs)


def in_short(count: float) -> str:
    """Three digits and a unit: 13.9 k, 3.36 M, 1.2 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            value = count / size
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    return f"{count:.0f} "


def milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def error_lines(confused: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    """The most frequent errors, as `42 cat as dog`."""
    return [f"{images} {names[true]} as {names[guess]}" for true, guess, images in confused]
