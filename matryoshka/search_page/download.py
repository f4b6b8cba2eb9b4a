"""Neighbours as files to save: JSON, and CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "search",
    "dimensions",
    "rank",
    "row",
    "name",
    "class",
    "cosine",
    "among_exact",
    "same_class",
)
# First characters by which spreadsheets take a text for a formula: owasp.org, "CSV Injection".
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def as_json(answer: Mapping[str, Any]) -> str:
    """The answer of `Service.neighbours`, indented."""
    return json.dumps(answer, indent=1) + "\n"


def as_csv(answer: Mapping[str, Any]) -> str:
    """One line for each neighbour: those of exact search at each prefix, then the fast search's.

    rank counts from 1. among_exact: whether exact search by all dimensions finds the row.
    same_class: empty if the class of the query is unknown.
    """
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    searches = [("exact", column["dim"], column) for column in answer["columns"]]
    searches.append(("adaptive", answer["adaptive"]["rerank"], answer["adaptive"]))
    for search, dim, found in searches:
        for rank, hit in enumerate(found["hits"], 1):
            same_class = hit["same_class"]
            writer.writerow(
                (
                    search,
                    dim,
                    rank,
                    hit["row"],
                    plain_text(hit["name"]),
                    plain_text(hit["class"] or ""),
                    hit["cosine"],
                    int(hit["agrees"]),
                    "" if same_class is None else int(same_class),
                )
            )
    return file.getvalue()


def plain_text(name: str) -> str:
    """A name that no spreadsheet evaluates: an apostrophe comes before a formula."""
    is_formula = name.startswith(FORMULA) or name.lstrip().startswith(FORMULA)
    return f"'{name}" if is_formula else name
