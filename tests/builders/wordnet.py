"""Builds imagenet_tree.json: WordNet's nouns at and above ImageNet-1K's classes.

    apt-get install wordnet-base
    python tests/builders/wordnet.py matryoshka/evaluation/imagenet_tree.json [data.noun]

ImageNet's WordNet ids are offsets into data.noun of WordNet 3.0, the version of Debian's package
(/usr/share/wordnet/data.noun). The format of that file: wndb(5WN).
"""

import json
import sys
from collections import Counter
from pathlib import Path

NOUNS = Path("/usr/share/wordnet/data.noun")
SETS = Path(__file__).resolve().parents[2] / "matryoshka" / "data" / "imagenet.json"
HYPERNYMS = ("@", "@i")  # a kind of, an instance of
# The text of "about" in the file.
ABOUT = (
    "node: [name, its hypernyms in WordNet's order]. A name is the synset's first lemma; if "
    "several nodes share it, the first hypernym's follows in brackets, or else the id. counted: "
    "the only hypernym that counts in the hierarchy of github.com/MadryLab/robustness (MIT), "
    "where it is not the first: the last one that ImageNet's wordnet.is_a.txt names, an order "
    "that WordNet's files lack. Those lines are identical in github.com/RAIVNLab/MRL (MIT), "
    "model_analysis/imgnt_meta."
)
# Pairs of a node and its counted hypernym.
COUNTED = """
n00007846 n00007347  n00019613 n13809207  n02084071 n01317541  n02090827 n02384858
n02121808 n01317541  n02534734 n02512938  n02757462 n04377057  n02760855 n03701391
n02808304 n02807260  n02892767 n04596852  n02916936 n02862048  n03051540 n03093574
n03085013 n03163973  n03134739 n03134853  n03151077 n03405265  n03445924 n03446832
n03483316 n03251766  n03602883 n03163973  n03724870 n03206718  n03770679 n02958343
n03773504 n04565375  n03776460 n03546340  n03932670 n03309808  n03982430 n03414162
n03990474 n04531098  n04118021 n03405265  n04264914 n04137444  n04284002 n03094503
n04371774 n03964744  n04389033 n04464852  n04423845 n03094503  n04458633 n03282591
n04486054 n03743902  n04552348 n03764276  n04552696 n03764276  n04576211 n03094503
n04579432 n04217718  n04597913 n04597804  n07710616 n07566863  n07739125 n13138842
n07881800 n14940386  n09214060 n09214581
"""


def read_nouns(path: Path) -> tuple[dict[str, tuple[str, list[str]]], str]:
    """Parse data.noun: ({wnid: (first lemma, wnids of its hypernyms)}, licence in its header)."""
    nouns = {}
    licence = []
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # "  14 WordNet 3.0 Copyright ..."
            words = line.split(maxsplit=1)
            licence.append(words[1].rstrip() if len(words) > 1 else "")
            continue
        # offset, file, type, number of lemmas (hexadecimal), lemmas, number of pointers, pointers
        fields = line.split(" | ")[0].split()
        lemmas = 2 * int(fields[3], 16)  # each with its lex_id
        num_pointers = int(fields[4 + lemmas])
        pointers = fields[4 + lemmas + 1 :]  # of four fields: symbol, offset, part, source/target
        hypernyms = []
        for i in range(num_pointers):
            symbol, offset = pointers[4 * i : 4 * i + 2]
            if symbol in HYPERNYMS:
                hypernyms.append(f"n{offset}")
        nouns[f"n{fields[0]}"] = (fields[4].replace("_", " "), hypernyms)
    return nouns, "\n".join(licence).strip()


def build(path: Path) -> str:
    """The text of the JSON file. Raises ValueError for another version of WordNet."""
    nouns, licence = read_nouns(path)
    if "WordNet 3.0 Copyright" not in licence:
        raise ValueError(f"{path}: not WordNet 3.0; ImageNet's ids are offsets into its files")

    # ---- the classes and all nodes above them ----
    waiting = list(json.loads(SETS.read_text())["1k"])
    nodes = {}
    while waiting:
        wnid = waiting.pop()
        if wnid not in nodes:
            nodes[wnid] = nouns[wnid]
            waiting += nouns[wnid][1]

    # ---- unique names ----
    names = {wnid: name for wnid, (name, _) in nodes.items()}
    for wnid in shared_names(names):
        names[wnid] += f" ({nodes[nodes[wnid][1][0]][0]})"
    for wnid in shared_names(names):
        names[wnid] = f"{nodes[wnid][0]} ({wnid})"

    ids = COUNTED.split()
    counted = dict(zip(ids[::2], ids[1::2], strict=True))
    for wnid, parent in counted.items():
        assert parent in nodes[wnid][1][1:], f"{parent} is not a later hypernym of {wnid}"

    # ---- one node a line ----
    head = {
        "source": "WordNet 3.0, Princeton University: data.noun, from Debian's package "
        "wordnet-base",
        "licence": licence,
        "about": ABOUT,
        "counted": counted,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = []
    for wnid in sorted(nodes):
        row = [names[wnid], *nodes[wnid][1]]
        rows.append(f"{json.dumps(wnid)}: {json.dumps(row)}")
    lines.append(' "nodes": {\n  ' + ",\n  ".join(rows) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def shared_names(names: dict[str, str]) -> list[str]:
    """The wnids whose name, ignoring case, is also that of another node."""
    count = Counter(name.lower() for name in names.values())
    return [wnid for wnid, name in names.items() if count[name.lower()] > 1]


if __name__ == "__main__":
    source = Path(sys.argv[2]) if len(sys.argv) > 2 else NOUNS
    Path(sys.argv[1]).write_text(build(source))
