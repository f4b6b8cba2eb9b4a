"""Superclasses of ImageNet-1K's classes: nodes of WordNet's nouns (Miller 1995) above them.

superclasses(wnids, "30")               the 30 largest groups; of all 1000 classes the paper's (MRL, section 5)
superclasses(wnids, "depth:6")          the nodes 6 below "entity"; also the integer 6
superclasses(wnids, "dog,bird,animal")  these nodes, by name or WordNet id; also a list
superclasses(wnids, "paper")            the paper's 30, whichever classes there are; also None

wnids: the data set's classes in the order of its labels, any of the 1000. A node may have several
hypernyms: a dog is a canine and a domestic animal. imagenet_tree.json has them all.
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
LEVELS = 'paper (its 30 groups of ImageNet-1K, default), a number of groups, depth:N below "entity", or names: dog,bird'


class SuperclassError(ValueError):
    """A class, a node or a level that there is not; the message says which there are."""

    user_error = True


class Grouping(NamedTuple):
    """groups: int64 [C], the group of every class, 0 for the rest. names, wnids: [K + 1], of the
    groups; those of group 0 are "other" and "".
    """

    groups: np.ndarray
    names: list[str]
    wnids: list[str]


class _Tree(NamedTuple):
    names: dict[str, str]
    above: dict[str, list[str]]  # hypernyms, in WordNet's order
    counted: dict[str, str]  # the one that counts where it is not the first


@cache
def _tree() -> _Tree:
    read = json.loads(Path(__file__).with_name("imagenet_tree.json").read_text())
    nodes = read["nodes"].items()
    return _Tree({w: row[0] for w, row in nodes}, {w: row[1:] for w, row in nodes}, read["counted"])


def name_of(wnid: str) -> str:
    """The name of a class or of a node above one: WordNet's first, such as "tench", and where
    several nodes share it "crane (wading bird)". No two nodes have the same. What is no id of these
    is its own name.
    """
    return _tree().names.get(wnid, wnid)


def class_names() -> list[str]:
    """Names of the 1000 classes in the order of their labels."""
    return [name_of(wnid) for wnid in imagenet.wnids()]


def superclasses(wnids: Sequence[str], level: int | str | Sequence[str] | None = None) -> Grouping:
    """Groups of the classes at a level, written as in the head of this file. SuperclassError for a
    class that is none of the 1000, a level that is none, and a level at which nothing, or less than
    was asked for, is left.
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
                f"superclasses {level!r}: give depth:N, N steps below entity, such as depth:6"
            )
        return by_depth(wnids, int(number))
    if word.isdecimal() and not number:
        return by_count(wnids, int(word))
    return by_node(wnids, [node.strip() for node in level.split(",") if node.strip()])


def paper_grouping(wnids: Sequence[str] | None = None) -> Grouping:
    """The 31 groups of the paper: by_count of all 1000 classes into 30, which hold 467 of them, and
    the rest. A group that has none of `wnids` stays, empty.
    """
    every = imagenet.wnids()
    known = by_count(every, PAPER)
    if wnids is None:
        return known
    _check(wnids)
    group = dict(zip(every, known.groups, strict=True))
    return known._replace(groups=np.array([group[wnid] for wnid in wnids], dtype=np.int64))


def by_count(wnids: Sequence[str], count: int) -> Grouping:
    """The `count` largest groups, largest first, by the rule of robustness'
    ImageNetHierarchy.get_superclasses (unbalanced, below "entity"), which the paper's repository
    uses.

    The rule: go through the nodes by falling number of classes below them, and take each; it
    displaces the nodes above it, so that classes of those which it does not have go to the rest.
    Stop at `count`. Of a node's hypernyms only one counts, that which ImageNet's wordnet.is_a.txt
    names last: a dog is a domestic animal and no canine, hence a group "canine" of wolves and
    foxes. Ties go by the number of all nodes below, then by id; theirs by the lines of that file,
    so that of the paper's groups 22 and 23, of 12 classes each, are exchanged, and other counts may
    differ in groups as large as the smallest. Groups of a single class, which the rule would come
    to, are no superclasses here.
    """
    _check(wnids)
    number: Counter[str] = Counter()
    below: dict[str, set[str]] = {}
    for wnid in dict.fromkeys(wnids):
        path = [wnid]
        for node in _chain(wnid, _counted)[1:]:
            number[node] += 1
            below.setdefault(node, set()).update(path)
            path.append(node)
    large = [node for node in number if number[node] > 1 and node != ROOT]
    chosen: list[str] = []
    for node in sorted(large, key=lambda node: (-number[node], -len(below[node]), node)):
        if len(chosen) == count:
            break
        chosen = [other for other in chosen if node not in below[other]] + [node]
    if count < 1 or len(chosen) < count:
        raise SuperclassError(
            f"superclasses {count}: give 1 or more groups"
            if count < 1
            else f"superclasses {count}: of the data set's {len(wnids)} classes there are at "
            f"most {len(chosen)} groups "
            "of two or more"
        )
    return _grouping(wnids, chosen, lambda wnid: _chain(wnid, _counted))


def by_depth(wnids: Sequence[str], depth: int) -> Grouping:
    """The nodes `depth` steps below "entity" and above a class, largest first; along every node's
    first hypernym, which is the most natural one. Classes that are no deeper themselves go to the
    rest.
    """
    _check(wnids)
    chains = {wnid: _chain(wnid, _first)[::-1] for wnid in wnids}
    deepest = max((len(chain) - 2 for chain in chains.values()), default=0)
    if not 1 <= depth <= deepest:
        raise SuperclassError(
            f"superclasses at depth {depth}: the data set's {len(wnids)} classes have some at 1 "
            f"to {deepest}"
            f' (for a number of groups: "{depth}")'
        )
    number = Counter(chains[wnid][depth] for wnid in wnids if depth < len(chains[wnid]) - 1)
    chosen = sorted(number, key=lambda node: (-number[node], node))
    return _grouping(wnids, chosen, lambda wnid: _chain(wnid, _first)[1:])


def by_node(wnids: Sequence[str], nodes: Sequence[str]) -> Grouping:
    """One group for each of `nodes`, names or WordNet ids, in their order. A class is in the first
    that it is or is under by any of the hypernyms: ["dog", "animal"] are the dogs and the other
    animals.
    """
    _check(wnids)
    chosen = [_find(node) for node in nodes]
    if not chosen:
        raise SuperclassError(
            'superclasses: none given; give a number, "depth:6", "paper", or names such as '
            '"dog,bird"'
        )
    grouping = _grouping(wnids, chosen, _ancestors)
    for group in sorted({*range(1, len(chosen) + 1)} - {*grouping.groups.tolist()}):
        under = [wnid for wnid in wnids if chosen[group - 1] in _ancestors(wnid)]
        raise SuperclassError(
            f"superclasses: all {len(under)} classes of {nodes[group - 1]!r} are in those named "
            "before it; name the "
            "narrower first"
            if under
            else f"superclasses: none of the data set's {len(wnids)} classes is under "
            f"{nodes[group - 1]!r}; drop it"
        )
    return grouping


def _first(wnid: str) -> str:
    return _tree().above[wnid][0]


def _counted(wnid: str) -> str:
    return _tree().counted.get(wnid) or _first(wnid)


def _chain(wnid: str, parent: Callable[[str], str]) -> list[str]:
    """From a node up to entity, both included."""
    chain = [wnid]
    while chain[-1] != ROOT:
        chain.append(parent(chain[-1]))
    return chain


def _ancestors(wnid: str) -> dict[str, None]:
    """A node and all that is above it."""
    seen: dict[str, None] = {}
    waiting = [wnid]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            waiting += _tree().above[node]
    return seen


def _grouping(
    wnids: Sequence[str], chosen: Sequence[str], above: Callable[[str], Iterable[str]]
) -> Grouping:
    """above: the nodes that a class is in; of those that are chosen, the first chosen one holds."""
    number: dict[str, int] = {}
    for i, node in enumerate(chosen, start=1):
        number.setdefault(node, i)
    groups = [
        min((number[node] for node in above(wnid) if node in number), default=0) for wnid in wnids
    ]
    return Grouping(np.array(groups, dtype=np.int64), [OTHER, *map(name_of, chosen)], ["", *chosen])


def _check(wnids: Sequence[str]) -> None:
    known = set(imagenet.wnids())
    strange = [wnid for wnid in wnids if wnid not in known]
    if strange:
        raise SuperclassError(
            f"superclasses: the class {strange[0]!r} ({len(strange)} of {len(wnids)} classes) is "
            "no WordNet id of "
            "ImageNet-1K's 1000; they need a data set whose class folders have such names, as "
            "n01440764"
        )


def _find(node: str) -> str:
    """The id of a node given by id, or by name in any capitals. Without what stands in brackets if
    that is clear.
    """
    names = _tree().names
    if node in names:
        return node
    wanted = " ".join(node.replace("_", " ").lower().split())
    exact = [wnid for wnid, name in names.items() if name.lower() == wanted]
    found = exact or [
        wnid for wnid, name in names.items() if name.lower().partition(" (")[0] == wanted
    ]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(f"{names[wnid]!r} {wnid}" for wnid in found)
        raise SuperclassError(f"superclasses: {node!r} may be {shown}; give one of these")
    near = get_close_matches(wanted, {name.lower(): None for name in names.values()})
    remedy = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else "give a name of WordNet's, as 'dog', an id, as n02084071, a number of groups, "
        "depth:N, or paper"
    )
    raise SuperclassError(
        f"superclasses: {node!r} is the name of no node above ImageNet-1K's classes; {remedy}"
    )
