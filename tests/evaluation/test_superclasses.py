"""Superclasses against recursion over imagenet_tree.json, known facts, and the paper's list."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import wordnet
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.data.imagenet import wnids as set_wnids
from matryoshka.evaluation import superclasses as sc

FILE = Path(__file__).resolve().parents[2] / "matryoshka" / "evaluation" / "imagenet_tree.json"
TREE = json.loads(FILE.read_text())
NODES = TREE["nodes"]
CLASSES = json.loads((FILE.parents[1] / "data" / "imagenet.json").read_text())["1k"]
ENTITY = "n00001740"
# What the paper's notebook on superclasses printed: ids, and 467 for the number of their classes.
PAPERS = """
n02159955 n02092468 n04014297 n03419014 n04531098 n03405725 n03791235 n01726692 n02098550 n02087551
n02512053 n02000954 n02394477 n03699975 n04530566 n02484322 n07570720 n04451818 n07707451 n03733925
n02913152 n03528263 n03278248 n02083346 n03414162 n02104523 n01674464 n04586932 n01525720 n03738472
"""
SOME = st.lists(st.sampled_from(CLASSES), min_size=1, max_size=60, unique=True)
FEW = settings(max_examples=30)


@cache
def all_above(node):
    """A node and all nodes above it, by any hypernym."""
    return frozenset({node}).union(*map(all_above, NODES[node][1:]))


@cache
def one_above(node, counted):
    """The path from entity to a node along one hypernym of each."""
    if node == ENTITY:
        return (node,)
    parent = TREE["counted"].get(node, NODES[node][1]) if counted else NODES[node][1]
    return (*one_above(parent, counted), node)


def label(name):
    return sc.class_names().index(name)


def is_a(name, node_name):
    return node_name in {NODES[node][0] for node in all_above(CLASSES[label(name)])}


# ---------------------------------------------------------------- the file


def test_the_tree_has_exactly_the_nodes_above_the_classes():
    assert len(CLASSES) == 1000, "ImageNet-1K has 1000 classes"
    reached = set().union(*map(all_above, CLASSES))  # a cycle would never return
    assert reached == set(NODES)
    assert [node for node, (_, *above) in NODES.items() if not above] == [ENTITY]
    assert all(ENTITY in all_above(wnid) for wnid in CLASSES)
    for wnid in CLASSES:  # no class is above another
        assert not (all_above(wnid) - {wnid}) & set(CLASSES)
    for node, parent in TREE["counted"].items():
        assert parent in NODES[node][2:]
    assert FILE.stat().st_size < 120_000, "the tree is too large for the package"


def test_names_are_unique():
    names = [row[0].lower() for row in NODES.values()]
    assert len(set(names)) == len(names) == 1860, "names are not unique"
    assert not [name for name in names if "_" in name]
    assert sc.class_names()[:3] == ["tench", "goldfish", "great white shark"]
    assert sc.class_names() == [NODES[wnid][0] for wnid in CLASSES]
    assert {"crane (wading bird)", "crane (lifting device)"} <= set(sc.class_names())
    assert [sc.name_of(word) for word in ("n02084071", "my_cat")] == ["dog", "my_cat"]


def test_the_licence_is_kept():
    for words in (
        "WordNet 3.0 Copyright 2006 by Princeton University",
        'PROVIDED "AS IS"',
        "on ALL copies",
    ):
        assert words in TREE["licence"]
    assert "WordNet 3.0" in TREE["source"]


@pytest.mark.skipif(
    not wordnet.NOUNS.exists(), reason="needs WordNet: apt-get install wordnet-base"
)
def test_the_tree_is_wordnets():
    assert wordnet.build(wordnet.NOUNS).encode() == FILE.read_bytes()


def test_another_version_of_wordnet_is_refused(tmp_path):
    (tmp_path / "data.noun").write_text("  1 WordNet 3.1 Copyright 2011\n")
    with pytest.raises(ValueError, match=r"not WordNet 3\.0"):
        wordnet.build(tmp_path / "data.noun")


def test_noun_lines_follow_the_format(tmp_path):
    """wndb(5WN): lemma count in hexadecimal; other pointers are not hypernyms."""
    lemmas = " ".join(f"l_{i} 0" for i in range(16))
    (tmp_path / "data.noun").write_text(
        "  1 Licence | text\n  2  \n"
        f"00000123 03 n 10 {lemmas} 004 @ 00000456 n 0000 ~ 00000789 n 0000 @i 00000321 n 0000 + "
        "00000999 v 0101 "
        "| a | b\n"
    )
    assert wordnet.read_nouns(tmp_path / "data.noun") == (
        {"n00000123": ("l 0", ["n00000456", "n00000321"])},
        "Licence | text",
    )


# ---------------------------------------------------------------- known facts


@pytest.mark.parametrize(
    ("name", "nodes", "others"),
    [
        ("tench", ["fish", "animal", "entity"], ["bird", "artifact"]),
        (
            "golden retriever",
            ["dog", "sporting dog", "canine", "domestic animal", "mammal"],
            ["hound", "feline"],
        ),
        ("tabby", ["domestic cat", "feline", "carnivore"], ["canine"]),
        (
            "grand piano",
            ["stringed instrument", "percussion instrument", "artifact"],
            ["living thing"],
        ),
        ("minivan", ["car (motor vehicle)", "truck", "wheeled vehicle"], ["craft"]),
        ("daisy", ["flower", "plant (organism)"], ["animal"]),
        ("toilet tissue", ["paper", "matter"], ["living thing"]),
    ],
)
def test_known_facts(name, nodes, others):
    assert all(is_a(name, node) for node in nodes)
    assert not any(is_a(name, other) for other in others)
    for node in nodes:
        assert sc.superclasses([CLASSES[label(name)]], [node]).groups.tolist() == [1], (
            f"{name} is not under {node}"
        )
    for other in others:
        with pytest.raises(
            sc.SuperclassError,
            match=f"classes is under {other!r}; drop it".replace("(", r"\(").replace(")", r"\)"),
        ):
            sc.superclasses([CLASSES[label(name)]], [other])


def test_the_papers_superclasses():
    grouping = sc.paper_grouping()
    assert sorted(grouping.wnids[1:]) == sorted(PAPERS.split())
    moved = [(a, b) for a, b in zip(grouping.wnids[1:], PAPERS.split(), strict=True) if a != b]
    assert moved == [("n03278248", "n03528263"), ("n03528263", "n03278248")]  # of 12 classes each
    assert (grouping.groups.dtype, grouping.groups.shape) == (np.int64, (1000,))
    assert (grouping.groups > 0).sum() == 467, "the paper groups 467 classes"
    assert np.bincount(grouping.groups, minlength=31)[1:].tolist() == [
        27,
        26,
        24,
        24,
        23,
        21,
        21,
        17,
        17,
        17,
        16,
        16,
        15,
        14,
        13,
        13,
        12,
        12,
        12,
        12,
        12,
        12,
        12,
        12,
        12,
        12,
        11,
        11,
        11,
        10,
    ], "sizes of the groups"
    assert (grouping.names[0], grouping.wnids[0]) == ("other", "")
    assert grouping.names[1:] == [NODES[wnid][0] for wnid in grouping.wnids[1:]]
    of = {name: grouping.names[grouping.groups[i]] for i, name in enumerate(sc.class_names())}
    assert (of["golden retriever"], of["beagle"], of["timber wolf"]) == (
        "sporting dog",
        "hound",
        "canine",
    )
    assert (of["tench"], of["hammer"], of["chihuahua".capitalize()]) == ("fish", "tool", "other")
    again = sc.superclasses(set_wnids(), "30")
    assert np.array_equal(again.groups, grouping.groups), "by number and by name differ"
    assert again[1:] == grouping[1:]


def test_the_papers_superclasses_of_other_classes():
    whole = sc.paper_grouping()
    for kept in (set_wnids("A"), CLASSES[::-7], CLASSES[:1]):
        part = sc.superclasses(kept, "paper")
        assert part.groups.tolist() == [whole.groups[CLASSES.index(wnid)] for wnid in kept], (
            "a subset has other groups than all classes"
        )
        assert part[1:] == whole[1:]
        assert np.array_equal(sc.superclasses(kept).groups, part.groups), (
            "the default is not the paper's"
        )


# ---------------------------------------------------------------- any level, against recursion


def largest(wnids, count):
    """The rule of by_count with sets of nodes; None if there are fewer groups."""
    below = {}
    for wnid in wnids:
        path = one_above(wnid, True)
        for i, node in enumerate(path):
            below.setdefault(node, set()).update(path[i + 1 :])
    here = {node: nodes & set(wnids) for node, nodes in below.items()}
    ranked = sorted(
        (-len(here[node]), -len(below[node]), node) for node in below if len(here[node]) >= 2
    )
    chosen = []
    for _, _, node in ranked:
        if node == ENTITY:
            continue
        chosen = [other for other in chosen if other not in one_above(node, True)]
        chosen.append(node)
        if len(chosen) == count:
            return chosen, [
                next((i for i, c in enumerate(chosen, 1) if wnid in here[c]), 0) for wnid in wnids
            ]
    return None


def check_count(wnids, count):
    expected = largest(wnids, count)
    if expected is None:
        with pytest.raises(sc.SuperclassError, match="at most"):
            sc.superclasses(wnids, str(count))
    else:
        grouping = sc.superclasses(wnids, str(count))
        assert (grouping.wnids[1:], grouping.groups.tolist()) == expected, (
            "groups differ from the recursion"
        )
        assert set(grouping.groups.tolist()) >= set(range(1, count + 1)), "a group is empty"


@FEW
@given(SOME, st.integers(1, 12))
def test_a_number_of_groups(wnids, count):
    check_count(wnids, count)


@pytest.mark.parametrize("count", [1, 2, 10, 100, 218, 219])
def test_a_number_of_groups_of_all_classes(count):
    check_count(CLASSES, count)


@FEW
@given(SOME, st.integers(1, 18))
def test_a_depth(wnids, depth):
    paths = [one_above(wnid, False) for wnid in wnids]
    expected = [NODES[path[depth]][0] if len(path) > depth + 1 else "other" for path in paths]
    if set(expected) == {"other"}:
        with pytest.raises(sc.SuperclassError, match=f'depth {depth}: .*"{depth}"'):
            sc.superclasses(wnids, depth)
        return
    grouping = sc.superclasses(wnids, depth)
    assert [grouping.names[group] for group in grouping.groups] == expected, (
        "groups differ from the recursion"
    )
    sizes = np.bincount(grouping.groups, minlength=len(grouping.names))[1:].tolist()
    assert sizes == sorted(sizes, reverse=True), "groups are not sorted by size"
    assert sizes[-1] > 0, "a group is empty"
    assert np.array_equal(sc.superclasses(wnids, f"depth:{depth}").groups, grouping.groups), (
        "depth as text and as integer differ"
    )


@FEW
@given(
    SOME,
    st.lists(st.sampled_from(sorted(NODES)), min_size=1, max_size=5, unique=True),
    st.booleans(),
)
def test_nodes(wnids, nodes, by_name):
    given_as = [NODES[node][0].upper().replace(" ", "_") if by_name else node for node in nodes]
    expected = [
        next((i for i, n in enumerate(nodes, 1) if n in all_above(wnid)), 0) for wnid in wnids
    ]
    if set(expected) >= set(range(1, len(nodes) + 1)):
        grouping = sc.superclasses(wnids, given_as)
        assert (grouping.groups.tolist(), grouping.wnids) == (expected, ["", *nodes]), (
            "groups differ from the recursion"
        )
    else:
        with pytest.raises(sc.SuperclassError, match=r"classes is under |named before it"):
            sc.superclasses(wnids, given_as)


def test_nodes_are_taken_in_their_order():
    wnids = [CLASSES[label(name)] for name in ("beagle", "tench", "hammer")]
    grouping = sc.superclasses(wnids, " Dog, animal ,n04451818")
    assert (grouping.groups.tolist(), grouping.names) == (
        [1, 2, 3],
        ["other", "dog", "animal", "tool"],
    ), "nodes are not taken in their order"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wnids", "level", "words"),
    [
        (
            ["cat", *CLASSES[:2]],
            "30",
            ["superclasses: ", "'cat'", "1 of 3 classes", "class folders", "n01440764"],
        ),
        (["n02084071"], "30", ["'n02084071'"]),  # a dog is a node, not a class
        (CLASSES, "moneky", ["'moneky'", "did you mean", "'monkey'"]),
        (CLASSES, "qqqqqq", ["superclasses: 'qqqqqq'", "n02084071", "depth:N", "paper"]),
        (CLASSES, "n99999999", ["'n99999999'"]),
        (CLASSES, "vessel", ["'vessel (craft)' n04530566", "'vessel (container)' n04531098"]),
        (CLASSES, "animal,dog", ["'dog'", "118 classes", "narrower first"]),
        (CLASSES[:5], "dog", ["'dog'", "none of the data set's 5 classes"]),
        (CLASSES, "depth:six", ["depth:six", "depth:6"]),
        (CLASSES, "depth:18", ["depth 18", "1 to 17", '"18"']),
        (CLASSES, 0, ["depth 0", "1 to 17"]),
        (CLASSES, "0", ["superclasses 0", "1 or more"]),
        (CLASSES, "219", ["superclasses 219", "at most 218"]),
        ([], "1", ["at most 0"]),
        ([], 1, ["depth 1"]),
        (CLASSES, " , ", ["none given", "depth:6"]),
        (CLASSES, "", ["superclasses: none given", "depth:6"]),
        (CLASSES, [], ["none given"]),
    ],
)
def test_mistakes_are_one_line(wnids, level, words):
    with pytest.raises(sc.SuperclassError) as caught:
        sc.superclasses(wnids, level)
    assert caught.value.user_error
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
