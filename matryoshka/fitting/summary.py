"""The end of a fit in words: accuracy, a search, what more time would bring, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka.checkpoint import load_model
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.embeddings.reading import open_embeddings
from matryoshka.retrieval.store import Index


def train_accuracy(folder: Path, images: int) -> float:
    """Top-1 in percent of the full width on the photos trained on, from their embeddings."""
    model = load_model(folder / FINAL)
    embeddings = open_embeddings(folder / "embeddings" / "train")
    hits = 0
    with torch.inference_mode():
        for start in range(0, images, 4096):
            rows = slice(start, start + 4096)
            logits = model.head(torch.from_numpy(embeddings.X[rows].copy()))  # [G, B, C]
            labels = torch.from_numpy(embeddings.y[rows].copy())
            hits += int((logits[-1].argmax(1) == labels).sum())
    return 100 * hits / max(1, images)


NEIGHBOURS = 5


def search_example(folder: Path) -> str:
    """A sentence: the classes of the nearest photos of one validation photo."""
    index = Index(folder / "index")
    val = open_embeddings(folder / "embeddings" / "val")
    name = val.ids[0]
    hits = index.search(np.asarray(val.X[:1], np.float32), k=NEIGHBOURS + 1)
    # The photo itself is in the index, too.
    found = [row for row in hits.ids[0].tolist() if row >= 0 and index.name(row) != name]
    classes = [index.class_name(row) or "?" for row in found[:NEIGHBOURS]]
    own = (val.classes or [])[int(val.y[0])]
    return (
        f"A search for {name} ({own}) among {len(index):,} photos finds photos of: "
        f"{', '.join(classes)}."
    )


OVERFIT_POINTS = 25.0  # more accurate by this on known photos: it has learned them by heart


def time_advice(*, known: float, new: float, epochs: int) -> str:
    """A sentence on what more time would probably bring. known, new: top-1 in percent."""
    passes = "epoch" if epochs == 1 else "epochs"
    facts = (
        f"{known:.0f} % on the photos trained on, {new:.0f} % on new ones, after {epochs} {passes}"
    )
    if known - new >= OVERFIT_POINTS:
        return (
            f"More time would probably bring little ({facts}: it knows its photos by heart); more "
            "photos of each class would bring more."
        )
    if known < 90 and epochs < 100:
        return f"More time would probably bring more ({facts}: it is still learning)."
    return f"More time would probably bring little ({facts})."


def next_commands(root: Path, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Three commands to continue with: search, test, train longer."""
    quoted = shlex.quote(str(folder))
    model = shlex.quote(str(folder / FINAL))
    longer = f"matryoshka fit {shlex.quote(str(root))} --minutes {3 * settings['minutes']:g}"
    if settings["labels"]:
        longer += f" --labels {shlex.quote(settings['labels'])}"
    for name, default in (("val_share", 0.15), ("seed", 0)):
        if settings[name] != default:
            longer += f" --{name.replace('_', '-')} {settings[name]}"
    # From scratch: 5 minutes gave 65.5 %, 2 and then 4 from those weights 62.5 % (bench/NOTES.md).
    longer += f" --output {shlex.quote(str(folder) + '-longer')}"
    return [
        f"search   matryoshka retrieve serve {quoted}/index",
        f"test     matryoshka eval --path {model} --data-root NEW_PHOTOS",
        f"longer   {longer}",
    ]
