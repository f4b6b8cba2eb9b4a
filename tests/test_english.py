"""Words and phrases to avoid in code and documentation: CONTRIBUTING.md, "Style"."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("matryoshka", "train", "inference", "bench", "docs", "tests")
SUFFIXES = {".py", ".md", ".cpp", ".hpp", ".sh", ".html", ".js"}

# Each phrase with what to write instead.
AVOID = {
    r"(is|are|was|were) told": "is reported, says, knows",
    r"(is|are|was) said": "is printed, is reported",
    r"what (is|was) said": "the text, the message",
    r"(?<!\")go(es)? on\b(?! to)": "continues, resumes",
    r"(is|are|stands?|lies?) in the way": "name the conflict",
    r"(makes?|making) (no )?sense": "name the argument and its range",
    r"there is none": "does not exist, has no ...",
    r"(?<!there )(is|are) no \w+[.;,]": "is not a ...",
    r"mend(s|ed|ing)?": "repair, fix",
    r"so many": "the number itself",
    r"what is wrong with": "the problem, why ... is invalid",
    r"as it is wanted": "as requested",
    r"whatever": "any, regardless of",
    r"at most so (much|many)": "the limit itself",
    r"in the end": "finally, or leave it out",
    r"say(s)? so\b": "report it",
    r"nobody wants": "unused, not requested",
    r"gives? back": "returns",
    r"cannot be had": "is not available",
    r"ours beside": "compared with",
}
PATTERN = re.compile(r"(?<!\w)(?:" + "|".join(AVOID) + r")", re.IGNORECASE)


def pages() -> list[Path]:
    found = [p for name in FOLDERS for p in (ROOT / name).rglob("*") if p.suffix in SUFFIXES]
    found += [*ROOT.glob("*.md"), *ROOT.glob("*.py"), ROOT / "Makefile"]
    return sorted(p for p in found if p.is_file() and p != Path(__file__).resolve())


def offences(path: Path) -> list[str]:
    """`file:line: phrase: line` for every phrase to avoid."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for match in PATTERN.finditer(line):
            place = f"{path.relative_to(ROOT).as_posix()}:{number}"
            found.append(f"{place}: {match[0]!r}: {line.strip()}")
    return found


def test_plain_english():
    found = [line for path in pages() for line in offences(path)]
    assert not found, f"{len(found)} phrases to rewrite:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("The rank is told.", True),
        ("A slot is no row.", True),
        ("The run goes on.", True),
        ("It goes on to the next stage", False),
        ("It recommends a run", False),
        ("This is plain.", False),
    ],
)
def test_the_patterns(line, found):
    assert bool(PATTERN.search(line)) == found
