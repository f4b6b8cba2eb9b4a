"""Comparisons of accuracies: against SciPy and NumPy, their level on noise, their power."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matryoshka.inference import analyze
from random_scores import write_scores
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from matryoshka.report import claims, statements
from matryoshka.report.claims import Paired
from matryoshka.report.page import sections

# Words of a comparison: a sentence of the page that has one must come from statements.py.
COMPARES = re.compile(
    r"more accurate|less accurate|lose[s]? at most|matche?s?\b|better|beats|enough"
)
PAGES = 200


def pairs(most=300):
    return st.tuples(
        st.integers(0, most // 2), st.integers(0, most // 2), st.integers(1, most)
    ).map(lambda t: Paired(t[0], t[1], t[0] + t[1] + t[2]))


@given(pairs())
def test_mcnemar_is_the_binomial_test(pair):
    changed = pair.first_only + pair.second_only
    expected = binomtest(pair.first_only, changed).pvalue if changed else 1.0
    assert claims.mcnemar(pair) == pytest.approx(expected, abs=1e-9)


@given(pairs(), st.floats(0.001, 0.2))
def test_tango_against_a_numerical_maximum_of_the_likelihood(pair, margin):
    x, y, n = pair
    d = -margin

    def minus_log_likelihood(q):  # q: share of "only the first right"
        shares = np.maximum([q, q - d, 1 - 2 * q + d], 1e-300)
        return -(np.array([x, y, n - x - y]) * np.log(shares)).sum()

    bounds = (0, (1 + d) / 2)
    q = minimize_scalar(
        minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-13}
    ).x
    expected = (x - y - n * d) / np.sqrt(n * (2 * q - d - d * d))
    assert claims._tango_z(pair, d) == pytest.approx(expected, rel=1e-3, abs=5e-3)


@pytest.mark.parametrize("images", [60, 360, 3000])
@pytest.mark.parametrize("disagree", [0.02, 0.2])
def test_the_level_of_tango_where_exactly_the_margin_is_lost(images, disagree):
    rng = np.random.default_rng(images)
    shares = [disagree, disagree + 0.01, 0.99 - 2 * disagree]
    drawn = rng.multinomial(images, shares, size=20_000)
    found = [claims.loses_at_most(Paired(int(x), int(y), images)) for x, y, _ in drawn]
    assert np.mean(found) <= 0.035, "a loss of one point is called less than one point too often"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_against_a_loop(p_values):
    expected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > 0.05 / (len(p_values) - rank):
            break
        expected[index] = True
    assert claims.holm(np.array(p_values)).tolist() == expected


@given(st.data())
def test_counts_against_a_loop(data):
    n = data.draw(st.integers(1, 30))
    first = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    images = [int((labels == c).sum()) for c in range(4)]
    constant = np.array([y == images.index(max(images)) for y in labels])
    found = claims.against_constant(
        np.bincount(labels[first], minlength=4), np.bincount(labels, minlength=4)
    )
    assert found == claims.paired(first, constant)
    a = sum(1 for x, y in zip(first, constant, strict=True) if x and not y)
    b = sum(1 for x, y in zip(first, constant, strict=True) if y and not x)
    assert found == (a, b, n)


def test_the_tests_of_prefixes_stop_at_the_first_failure():
    good, bad = Paired(30, 30, 50_000), Paired(0, 900, 50_000)
    assert claims.shortest_within({8: good, 16: bad, 32: good, 64: good}) == 32
    assert claims.shortest_within({8: good, 16: bad}) is None


def test_the_bound_without_pairs_is_wider():
    """Two accuracies of 75 % on n images: a paired test needs far fewer images."""
    few = 2_000
    assert claims.loses_at_most(Paired(10, 10, few))
    assert claims.unpaired_loss(75, 75, few) > 1 > claims.unpaired_loss(75, 75, 20_000)


# ---------------------------------------------------------------- whole pages


def draw(folder, rng, images, chance, strength):
    """results.json, analysis.json of scores in which `strength` [G] is the weight of the label.

    chance: the share of each class in the labels.
    """
    dims = [8, 32, 512]
    results = write_scores(folder, rng, dims=dims, strengths=strength, chance=chance, images=images)
    file = folder / "results.json"
    analyses = "--only=cascade,oracle,trends"
    assert analyze.main([f"--results={file}", "--splits=2", analyses, "--epsilon=1"]) == 0
    return results, json.loads((folder / "analysis.json").read_text())


def said_about(results, found):
    """Every comparison that a page makes of these files."""
    cascade = sections.cascade(found)
    oracle = sections.oracle(found)
    classes = sections.classes(found)
    assert cascade
    assert oracle
    assert classes
    return {
        "headline": statements.headline(results, found),
        "card": str(statements.certified_cascade(found)),
        "cascade": cascade["sentence"],
        "vote": oracle["sentence"],
        "classes": classes["sentence"],
    }


SUPPORTED = "95 % confidence"


def test_noise_supports_no_claim(tmp_path):
    """Random predictions of few images: each claim at most as often as its level allows."""
    rng = np.random.default_rng(0)
    fired = dict.fromkeys(("headline", "card", "cascade", "vote", "classes"), 0)
    for _ in range(PAGES):
        results, found = draw(tmp_path, rng, 80, np.full(6, 1 / 6), (0, 0, 0))
        said = said_about(results, found)
        for name in fired:
            claims_it = SUPPORTED in said[name] or (name == "card" and said[name] != "None")
            fired[name] += claims_it
    assert max(fired.values()) <= 0.05 * PAGES + 8, f"claims from {PAGES} pages of noise: {fired}"


def test_equal_prefixes_are_not_called_different(tmp_path):
    rng = np.random.default_rng(1)
    fired = dict.fromkeys(("headline", "classes"), 0)
    for _ in range(PAGES):
        results, found = draw(tmp_path, rng, 100, np.full(6, 1 / 6), (1.5, 1.5, 1.5))
        said = said_about(results, found)
        for name in ("headline", "classes"):
            fired[name] += "more accurate" in said[name]
    assert max(fired.values()) <= 0.05 * PAGES + 8, f"of {PAGES} pages: {fired}"


def test_clear_data_support_the_claims(tmp_path):
    rng = np.random.default_rng(0)
    even = np.full(6, 1 / 6)
    results, found = draw(tmp_path, rng, 3000, even, (8.0, 9.0, 9.0))
    said = said_about(results, found)
    assert "The first 8 lose at most one point against all 512" in said["headline"]
    assert said["card"] != "None"
    assert "loses at most one point" in said["cascade"]
    assert SUPPORTED in said["vote"]

    results, found = draw(tmp_path, rng, 3000, even, (0.5, 2.0, 4.0))
    said = said_about(results, found)
    assert "All 512 are more accurate than the first 8" in said["headline"]
    assert "6 classes are more accurate with the longest prefix" in said["classes"]
    assert "The longest prefix is more accurate than the vote" in said["vote"]

    results, found = draw(tmp_path, rng, 3000, even, (4.0, 2.0, 0.5))
    assert "The first 8 are more accurate than all 512" in said_about(results, found)["headline"]


def test_a_model_below_the_most_frequent_class_is_not_praised(tmp_path):
    rng = np.random.default_rng(0)
    results, found = draw(tmp_path, rng, 500, [0.9, *[0.02] * 5], (0.5, 0.5, 0.5))
    said = said_about(results, found)
    assert "always answering the most frequent class" in said["headline"]
    assert SUPPORTED not in said["headline"]
    assert said["card"] == "None"


def test_without_pairs_only_many_images_support_a_claim():
    def results(images):
        prefixes = {"8": {"top1": 74.9}, "16": {"top1": 75.0}, "512": {"top1": 75.0}}
        return {"prefixes": prefixes, "images": images}

    few = statements.headline(results(360), {})
    assert "360 images are too few to say whether 8 match all 512" in few
    low, high = 70.2, 79.1  # Wilson's interval of 74.9 % of 360
    assert f"Between {low} and {high} % with 8" in few
    many = statements.headline(results(50_000), {})
    assert "The first 8 lose at most one point against all 512 (95 % confidence)" in many


def test_superclasses_are_compared_with_the_largest_one():
    def found(confusion):
        images = [sum(row) for row in confusion]
        groups = {"names": ["other", "dog"], "images": images, "confusion": {"8": confusion}}
        return {"superclasses": groups}

    bad = statements.superclass_sentence(found([[300, 60], [20, 20]]))
    assert "Always answering “other” is right on 90.00 %" in bad
    assert "No prefix is shown to be more accurate" in bad
    good = statements.superclass_sentence(found([[350, 10], [5, 35]]))
    assert "Every prefix is more accurate than that" in good


def test_files_of_older_versions_make_no_claim():
    old = {"dims": [8, 512], "cascade": {"splits": 2}, "oracle": {"top1": 50.0}, "trends": {}}
    assert statements.cascade_sentence(old) == ""
    assert statements.vote_sentence(old) == ""
    assert statements.certified_cascade(old) is None
    assert "chance" in statements.classes_sentence(old)


def test_every_comparison_on_the_page_is_one_of_statements():
    """The page's own text, the fixed part, compares nothing."""
    folder = Path(sections.__file__).parent
    text = (folder / "page.html").read_text()
    for variable in ("headline", "cascade.sentence", "oracle.sentence", "classes.sentence"):
        assert f"{{{{ {variable} }}}}" in text, f"the page does not show {variable}"
    explained = ["the cascade loses no more than this accuracy on new images"]  # of a certificate
    for sentence in explained:
        text = text.replace(sentence, "")
    assert COMPARES.findall(text) == []
    assert COMPARES.findall((folder / "sections.py").read_text()) == ["lose at most"]  # certified


def test_older_files_without_pairs_make_no_claim_at_chance():
    """Random predictions of 10 classes: at most 1 of 40 pages may make a claim."""
    rng = np.random.default_rng(3)
    images, claimed = 300, 0
    for _ in range(200):
        top1 = {d: 100 * float(rng.binomial(images, 0.1)) / images for d in (8, 32, 512)}
        subject = {"prefixes": {str(d): {"top1": a} for d, a in top1.items()}}
        subject |= {"images": images, "classes": 10}
        analysis = {"dims": list(top1), "images": images, "classes": 10}
        analysis["top1"] = {str(d): a for d, a in top1.items()}
        for found in ({}, analysis):
            claimed += statements.SUPPORTED in statements.headline(subject, found)
    assert claimed <= 400 * 0.025, f"{claimed} of 400 pages of noise make a claim"
