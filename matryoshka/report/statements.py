"""Every sentence of the report that compares accuracies, from results.json and analysis.json.

A comparison is made only where a test of claims.py supports it; otherwise the sentence says that
the images are too few. Keys of the files: `paired` (each shorter prefix against the longest),
`against_constant` (each prefix against always answering the most frequent class). Files of older
versions lack them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from matryoshka.report.claims import (
    MARGIN,
    Paired,
    against_constant,
    beats,
    holm,
    mcnemar,
    shortest_within,
    unpaired_loss,
    verdict,
)
from matryoshka.report.tables import wilson_interval

Json = Mapping[str, Any]
SUPPORTED = "(95 % confidence)"


def top1_by_dim(results: Json) -> dict[int, float]:
    return {int(d): row["top1"] for d, row in results["prefixes"].items()}


def headline(subject: Json, analysis: Json) -> str:
    """Accuracy of the shortest and the longest prefix, and what the images say about them."""
    values = top1_by_dim(subject)
    first, last = min(values), max(values)
    if first == last:
        text = f"{values[last]:.1f} % top-1 with {last} dimensions."
    elif has_widths(subject):
        text = (
            f"{values[first]:.1f} % top-1 with width {first}, {values[last]:.1f} % with width "
            f"{last}."
        )
    else:
        text = (
            f"{values[first]:.1f} % top-1 with the first {_dimensions(first)}, "
            f"{values[last]:.1f} % with all {last}."
        )
    if is_chance(analysis, last) or (not analysis and not _above_chance(subject, values[last])):
        return (
            f"{text} These {subject['images']:,} images do not show that this is better than "
            "always answering the most frequent class."
        )
    if first == last:
        return text
    return f"{text} {_lengths(values, subject, analysis)}"


def has_widths(subject: Json) -> bool:
    """Whether each dim is a forward pass of its own: a width, not a prefix of one embedding."""
    return subject.get("one_pass") is False


def _dimensions(count: int) -> str:
    return "dimension" if count == 1 else f"{count} dimensions"


def _shorter(count: int, widths: bool) -> tuple[str, bool]:
    """A prefix or a width as the subject of a sentence, and whether that is a plural."""
    if widths:
        return f"Width {count}", False
    return ("The first dimension", False) if count == 1 else (f"The first {count}", True)


def is_chance(analysis: Json, dim: int) -> bool:
    """Whether a prefix is not shown to be better than the most frequent class.

    Files of older versions lack the pairs: the accuracy is then compared with 1 / classes, which
    the most frequent class reaches at least. False without the numbers for that.
    """
    constant = _pairs(analysis.get("against_constant"))
    if dim in constant:
        return not beats(constant[dim])
    top1 = analysis.get("top1", {}).get(str(dim))
    return top1 is not None and not _above_chance(analysis, top1)


def _above_chance(counts: Json, top1: float) -> bool:
    """Whether the interval of an accuracy lies above 1 / classes; True if these are not known."""
    images = counts.get("images")
    classes = counts.get("classes")
    if not images or not classes:
        return True
    return wilson_interval(top1, images)[0] > 100 / classes


def _pairs(found: Json | None) -> dict[int, Paired]:
    return {int(dim): Paired(**counts) for dim, counts in (found or {}).items()}


def _lengths(values: Mapping[int, float], subject: Json, analysis: Json) -> str:
    """The shortest prefix that is as good as the longest one, or why no claim is made."""
    first, last = min(values), max(values)
    pairs = _pairs(analysis.get("paired") or subject.get("paired"))
    images = subject["images"]
    if pairs:
        enough = shortest_within(pairs)
        against_last = verdict(pairs[first])
    else:
        enough = _shortest_within_unpaired(values, images)
        against_last = "unknown"
    widths = has_widths(subject)
    whole = f"width {last}" if widths else f"all {last}"
    shorter, is_plural = _shorter(first, widths)
    if against_last == "better":
        verb = "are" if is_plural else "is"
        return f"{shorter} {verb} more accurate than {whole} {SUPPORTED}."
    if enough is not None:
        shorter, is_plural = _shorter(enough, widths)
        verb = "lose" if is_plural else "loses"
        return f"{shorter} {verb} at most one point against {whole} {SUPPORTED}."
    if against_last == "worse":
        verb = "is" if widths else "are"
        return f"{whole.capitalize()} {verb} more accurate than {shorter.lower()} {SUPPORTED}."
    low, high = wilson_interval(values[first], images)
    if widths:
        return (
            f"Between {low:.1f} and {high:.1f} % with width {first}: {images:,} images are too few "
            f"to say whether it matches {whole}."
        )
    return (
        f"Between {low:.1f} and {high:.1f} % with {first}: {images:,} images are too few to say "
        f"whether {first} match {whole}."
    )


def _shortest_within_unpaired(values: Mapping[int, float], images: int) -> int | None:
    """`shortest_within` from the accuracies alone."""
    shorter = sorted(values)[:-1]
    enough = None
    for dim in reversed(shorter):
        if unpaired_loss(values[dim], values[max(values)], images) >= MARGIN:
            break
        enough = dim
    return enough


def certified_cascade(analysis: Json) -> Json | None:
    """The certificate of the headline's margin, if there is one and the model is not at chance."""
    if is_chance(analysis, max(analysis.get("dims", [0]))):
        return None
    for certificate in analysis.get("cascade", {}).get("certified", ()):
        if certificate["epsilon"] == MARGIN and certificate["certified"]:
            return certificate
    return None


def about(name: str, analysis: Json) -> str:
    """The sentence on one analysis of analysis.json; empty if there is nothing to compare."""
    sentences = {
        "cascade": cascade_sentence,
        "oracle": vote_sentence,
        "superclasses": superclass_sentence,
        "trends": classes_sentence,
    }
    return sentences[name](analysis) if name in sentences else ""


def cascade_sentence(analysis: Json) -> str:
    """The cascade of all prefixes against the longest prefix alone.

    Empty for older files, and at chance, where a comparison means nothing.
    """
    counts = analysis["cascade"].get("against_longest")
    if not counts or is_chance(analysis, max(analysis["dims"])):
        return ""
    pair = Paired(**counts)
    where = f"On the {pair.images:,} test images of the first split"
    said = {
        "better": f"the cascade of all prefixes is more accurate than the longest {SUPPORTED}",
        "within": f"the cascade of all prefixes loses at most one point {SUPPORTED}",
        "worse": f"the longest prefix is more accurate than the cascade {SUPPORTED}",
        "unknown": "it remains open whether the cascade of all prefixes matches the longest",
    }
    counted = (
        f"the cascade alone is right on {pair.first_only:,}, the longest prefix alone on "
        f"{pair.second_only:,}"
    )
    return f"{where}, {said[verdict(pair)]}: {counted}."


def vote_sentence(analysis: Json) -> str:
    """A majority vote of the prefixes against the longest prefix; else as `cascade_sentence`."""
    counts = analysis["oracle"].get("vote_against_longest")
    dims = analysis["dims"]
    if not counts or len(dims) < 2 or is_chance(analysis, max(dims)):
        return ""
    said = {
        "better": f"The vote is more accurate than the longest prefix {SUPPORTED}.",
        "within": f"The vote loses at most one point against the longest prefix {SUPPORTED}.",
        "worse": f"The longest prefix is more accurate than the vote {SUPPORTED}.",
        "unknown": "The images are too few to say whether the vote matches the longest prefix.",
    }
    return said[verdict(Paired(**counts))]


def superclass_sentence(analysis: Json) -> str:
    """Which prefixes recognise groups better than always answering the largest one."""
    superclasses = analysis.get("superclasses")
    if not superclasses:
        return ""
    images = np.array(superclasses["images"])
    dims = list(superclasses["confusion"])
    pairs = []
    for dim in dims:
        right = np.diag(np.array(superclasses["confusion"][dim]))
        pairs.append(against_constant(right, images))
    rejected = holm(np.array([mcnemar(pair) for pair in pairs]))
    above = []
    for dim, pair, differs in zip(dims, pairs, rejected, strict=True):
        if differs and pair.first_only > pair.second_only:
            above.append(dim)
    name = superclasses["names"][int(images.argmax())]
    text = f"Always answering “{name}” is right on {constant_share(superclasses):.2f} %. "
    if not above:
        return text + "No prefix is shown to be more accurate than that."
    if len(above) == len(dims):
        return text + f"Every prefix is more accurate than that {SUPPORTED}."
    return text + f"More accurate than that {SUPPORTED}: {', '.join(above)}."


def constant_share(superclasses: Json) -> float:
    """Percent of the images in the largest group."""
    return 100 * max(superclasses["images"]) / sum(superclasses["images"])


def classes_sentence(analysis: Json) -> str:
    """How many classes change from the shortest to the longest prefix by more than chance."""
    if len(analysis["dims"]) < 2:
        return ""
    changes = analysis.get("class_changes")
    if not changes:
        return "In classes with few images, most steps are chance."
    better, worse = changes["better"], changes["worse"]
    if not better + worse:
        return (
            "For no single class is a change between the shortest and the longest prefix larger "
            "than chance allows."
        )
    return (
        f"Larger than chance allows {SUPPORTED}: {better} classes are more accurate with the "
        f"longest prefix than with the shortest, {worse} less. The steps of the others may be "
        "chance."
    )
