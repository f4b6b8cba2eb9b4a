"""Superclasses of ImageNet-1K: groups of classes under common nodes of WordNet (Miller 1995).

superclasses(wnids, "30")               the 30 largest groups
superclasses(wnids, "depth:6")          the nodes 6 steps below "entity"; also the integer 6
superclasses(wnids, "dog,bird,animal")  these nodes, by name or WordNet id; also a list
superclasses(wnids, "paper")            the 30 groups of the MRL paper (section 5); also None

wnids: the data set's classes in the order of its labels, a subset of the 1000. For all 1000 classes
"30" and "paper" are equal. A node may have several hypernyms: a dog is a canine and a domestic
animal. imagenet_tree.json holds all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matryoshka.data import imagenet

ROOT = "n00001740"  # entity
OTHER = "other"
PAPER = 30
LEVELS = (
    'paper (its 30 groups of ImageNet-1K, default), a number of groups, depth:N below "entity", or '
    "names: dog,bird"
)


class SuperclassError(ValueError):
    """An unknown class, node or level; the message names valid ones."""

    user_error = True


class Grouping(NamedTuple):
    """Groups of classes.

    groups: int64 [C], the group of each class, 0 for classes without a group. names, wnids: K + 1
    each, of the groups; those of group 0 are "other" and "".
    """

    groups: np.ndarray
    names: list[str]
    wnids: list[str]


class _Tree(NamedTuple):
    names: dict[str, str]
    hypernyms: dict[str, list[str]]  # in WordNet's order
    counted: dict[str, str]  # hypernym used by `by_count`, if it is not the first


@cache
def _tree() -> _Tree:
    tree = json.loads(Path(__file__).with_name("imagenet_tree.json").read_text())
    names = {}
    hypernyms = {}
    for wnid, (name, *above) in tree["nodes"].items():
        names[wnid] = name
        hypernyms[wnid] = above
    return _Tree(names, hypernyms, tree["counted"])


def name_of(wnid: str) -> str:
    """The unique name of a class or of a node above one; other ids are returned unchanged.

    It is WordNet's first name, such as "tench"; if several nodes share it, "crane (wading bird)".
    """
    return _tree().names.get(wnid, wnid)


def class_names() -> list[str]:
    """Names of the 1000 classes in the order of their labels."""
    return [name_of(wnid) for wnid in imagenet.wnids()]


def superclasses(wnids: Sequence[str], level: int | str | Sequence[str] | None = None) -> Grouping:
    """Group the classes at a level, written as in the module docstring.

    Raises SuperclassError for a class outside ImageNet-1K, an invalid level, and a level with no
    groups or fewer than requested.
    """
    if level is None:
        return paper_grouping(wnids)
    if isinstance(level, int):
        return by_depth(wnids, level)
    if not isinstance(level, str):
        return by_node(wnids, level)
    word, _, number = level.strip().partition(":")
    if word == "paper" and not number:
        return paper_grouping(wnids)
    if word == "depth":
        if not number.strip().isdecimal():
            raise SuperclassError(
                f"superclasses {level!r}: expected depth:N, N steps below entity, such as depth:6"
            )
        return by_depth(wnids, int(number))
    if word.isdecimal() and not number:
        return by_count(wnids, int(word))
    return by_node(wnids, [node.strip() for node in level.split(",") if node.strip()])


def paper_grouping(wnids: Sequence[str] | None = None) -> Grouping:
    """The 30 groups of the paper, which hold 467 of the 1000 classes, and "other".

    They are `by_count` of all 1000 classes; a group without a class of `wnids` is kept, empty.
    """
    # From all 1000 classes: the largest groups of a subset would be others.
    every = imagenet.wnids()
    grouping = by_count(every, PAPER)
    if wnids is None:
        return grouping
    _check_wnids(wnids)
    group_of = dict(zip(every, grouping.groups, strict=True))
    return grouping._replace(groups=np.array([group_of[wnid] for wnid in wnids], dtype=np.int64))


def by_count(wnids: Sequence[str], count: int) -> Grouping:
    """The `count` largest groups, largest first, as in the paper's repository.

    The rule is that of robustness' ImageNetHierarchy.get_superclasses (unbalanced, below "entity"):
    take the nodes by falling number of classes below them, until `count` are chosen. Each replaces
    the chosen nodes above it, whose remaining classes go to "other". Only one hypernym of a node
    counts, the one that ImageNet's wordnet.is_a.txt names last: a dog is a domestic animal and not
    a canine, so that "canine" is a group of wolves and foxes.

    Ties go by the number of all nodes below, then by id. robustness breaks them by the order of
    lines in that file: the paper's groups 22 and 23, of 12 classes each, are swapped, and other
    counts may differ in groups as large as the smallest. Groups of a single class are excluded.
    """
    _check_wnids(wnids)
    if count < 1:
        raise SuperclassError(f"superclasses {count}: expected 1 or more groups")

    num_classes: Counter[str] = Counter()  # below each node
    below: dict[str, set[str]] = {}  # all nodes below each node
    for wnid in dict.fromkeys(wnids):
        path = [wnid]  # the nodes below the current one
        for node in _path_to_root(wnid, _counted_hypernym)[1:]:
            num_classes[node] += 1
            below.setdefault(node, set()).update(path)
            path.append(node)

    large = [node for node in num_classes if num_classes[node] > 1 and node != ROOT]
    large.sort(key=lambda node: (-num_classes[node], -len(below[node]), node))
    # A node follows all nodes above it: these have at least as many classes, and more nodes below.
    chosen: list[str] = []
    for node in large:
        if len(chosen) == count:
            break
        chosen = [other for other in chosen if node not in below[other]]
        chosen.append(node)
    if len(chosen) < count:
        raise SuperclassError(
            f"superclasses {count}: the data set's {len(wnids)} classes have at most "
            f"{len(chosen)} groups of two or more"
        )
    return _group(wnids, chosen, lambda wnid: _path_to_root(wnid, _counted_hypernym))


def by_depth(wnids: Sequence[str], depth: int) -> Grouping:
    """The nodes `depth` steps below "entity", largest first.

    Paths follow the first hypernym of every node, which is the most natural one. Classes at this
    depth or above it go to "other".
    """
    _check_wnids(wnids)
    paths = {wnid: _path_to_root(wnid, _first_hypernym)[::-1] for wnid in wnids}  # from entity
    # A class itself is not a group: the deepest group is the node above the deepest class.
    deepest = max((len(path) - 2 for path in paths.values()), default=0)
    if not 1 <= depth <= deepest:
        raise SuperclassError(
            f"superclasses at depth {depth}: expected a depth of 1 to {deepest} for the data set's "
            f'{len(wnids)} classes (for a number of groups: "{depth}")'
        )
    num_classes = Counter(paths[wnid][depth] for wnid in wnids if depth < len(paths[wnid]) - 1)
    chosen = sorted(num_classes, key=lambda node: (-num_classes[node], node))
    return _group(wnids, chosen, lambda wnid: _path_to_root(wnid, _first_hypernym)[1:])


def by_node(wnids: Sequence[str], nodes: Sequence[str]) -> Grouping:
    """One group for each of `nodes`, names or WordNet ids, in their order.

    A class belongs to the first node that it equals or is below, by any hypernym: ["dog", "animal"]
    are the dogs and the other animals.
    """
    _check_wnids(wnids)
    chosen = [_find_node(node) for node in nodes]
    if not chosen:
        raise SuperclassError(
            'superclasses: none given; give a number, "depth:6", "paper", or names such as '
            '"dog,bird"'
        )
    grouping = _group(wnids, chosen, _ancestors)
    used = set(grouping.groups.tolist())
    for group, (given, node) in enumerate(zip(nodes, chosen, strict=True), start=1):
        # An empty group is a mistake in the list of nodes: report which one, and why.
        if group in used:
            continue
        below = [wnid for wnid in wnids if node in _ancestors(wnid)]
        if below:
            raise SuperclassError(
                f"superclasses: all {len(below)} classes of {given!r} are in groups named before "
                "it; name the narrower first"
            )
        raise SuperclassError(
            f"superclasses: none of the data set's {len(wnids)} classes is under {given!r}; drop it"
        )
    return grouping


# ---------------------------------------------------------------- the tree


def _first_hypernym(wnid: str) -> str:
    return _tree().hypernyms[wnid][0]


def _counted_hypernym(wnid: str) -> str:
    return _tree().counted.get(wnid) or _first_hypernym(wnid)


def _path_to_root(wnid: str, parent: Callable[[str], str]) -> list[str]:
    """The nodes from one up to "entity", both included."""
    path = [wnid]
    while path[-1] != ROOT:
        path.append(parent(path[-1]))
    return path


def _ancestors(wnid: str) -> dict[str, None]:
    """A node and all nodes above it, by every hypernym, as an ordered set."""
    seen: dict[str, None] = {}
    waiting = [wnid]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            waiting += _tree().hypernyms[node]
    return seen


def _group(
    wnids: Sequence[str], chosen: Sequence[str], nodes_of: Callable[[str], Iterable[str]]
) -> Grouping:
    """Assign each class to the first of the `chosen` nodes that is in nodes_of(class)."""
    number: dict[str, int] = {}
    for i, node in enumerate(chosen, start=1):
        number.setdefault(node, i)
    groups = []
    for wnid in wnids:
        matching = [number[node] for node in nodes_of(wnid) if node in number]
        groups.append(min(matching, default=0))  # 0: "other"
    names = [OTHER, *(name_of(node) for node in chosen)]
    return Grouping(np.array(groups, dtype=np.int64), names, ["", *chosen])


def _check_wnids(wnids: Sequence[str]) -> None:
    known = set(imagenet.wnids())
    unknown = [wnid for wnid in wnids if wnid not in known]
    if unknown:
        raise SuperclassError(
            f"superclasses: the class {unknown[0]!r} ({len(unknown)} of {len(wnids)} classes) is "
            "not a WordNet id of ImageNet-1K; superclasses need class folders with such names, "
            "e.g. n01440764"
        )


def _find_node(node: str) -> str:
    """The id of a node given by id or name.

    Names ignore case; an addition in brackets may be omitted if the name is unambiguous.
    """
    names = _tree().names
    if node in names:
        return node
    words = " ".join(node.replace("_", " ").lower().split())
    matches = [wnid for wnid, name in names.items() if name.lower() == words]
    if not matches:
        matches = [wnid for wnid, name in names.items() if name.lower().split(" (")[0] == words]
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(f"{names[wnid]!r} {wnid}" for wnid in matches)
        raise SuperclassError(f"superclasses: {node!r} is ambiguous: {shown}; give one of these")

    near = get_close_matches(words, [name.lower() for name in names.values()])
    remedy = (
        "give a WordNet name such as dog, an id such as n02084071, a number of groups, depth:N, "
        "or paper"
    )
    if near:
        remedy = f"did you mean {' or '.join(map(repr, near))}?"
    raise SuperclassError(
        f"superclasses: {node!r} is not the name of a node above ImageNet-1K's classes; {remedy}"
    )
