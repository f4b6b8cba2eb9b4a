"""Classes of an index by the names that the page shows, and their rows as a filter of searches."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from matryoshka.data.reader import printable
from matryoshka.evaluation.superclasses import name_of
from matryoshka.retrieval.store import Index
from matryoshka.search_page.pictures import Refusal

WNID = re.compile(r"n\d{8}")


def shown_class(name: str) -> str:
    """A class name as the page shows it; names come from files and may hold anything."""
    # ImageNet's class folders have WordNet ids: show the class's English name.
    return printable(name_of(name) if WNID.fullmatch(name) else name)


class ClassRows:
    """Rows of each class of an index; parts may number the same classes differently.

    names: sorted shown names of the classes that have rows; empty if the index names no classes.
    """

    def __init__(self, index: Index) -> None:
        rows = dict[str, list[np.ndarray]]()
        for part in index.parts:
            # Sorted once: a comparison with each of 1,000 labels would read all labels as often.
            order = np.argsort(part.labels, kind="stable")
            classes = part.classes or []
            ends = np.searchsorted(part.labels[order], np.arange(len(classes) + 1))
            for label, name in enumerate(classes):
                found = part.first + order[ends[label] : ends[label + 1]]
                found = found[~index.is_deleted(found)]
                if len(found):
                    rows.setdefault(shown_class(name), []).append(found)
        self._rows = {name: np.concatenate(found) for name, found in rows.items()}
        self.names = sorted(self._rows)

    def rows_of(self, names: Sequence[str]) -> np.ndarray:
        """Rows of these classes, int64, rising. Refusal for a class that the index lacks."""
        unknown = [name for name in names if name not in self._rows]
        if unknown:
            raise Refusal(400, "class: the index has no class of this name")
        return np.sort(np.concatenate([self._rows[name] for name in set(names)]))

    def filter(self, names: Sequence[str]) -> np.ndarray | None:
        """`rows_of`, None for all rows if `names` is empty."""
        return self.rows_of(names) if names else None
