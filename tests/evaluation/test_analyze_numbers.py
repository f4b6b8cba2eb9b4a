"""Hold-out, temperature and vote numbers of `matryoshka analyze`, and its choice of arrays."""

import json
import math

import numpy as np
import pytest
import torch
from matryoshka.inference import analyze
from scipy import optimize
from scipy.special import log_softmax, softmax

from matryoshka.evaluation import imagenet_sets
from matryoshka.evaluation.cascade import certify, learn_thresholds, split_indices
from matryoshka.evaluation.prediction_arrays import from_files, from_results

DIMS = [8, 32, 128]
N, C, SPLITS, SEED = 1200, 5, 6, 4
TEMPERATURES = (0.4, 1.6, 4.0)  # of the prefixes: what makes their softmax right


@pytest.fixture(scope="module")
def arrays():
    """(logits [3, 1200, 5], labels). For one-hot classes of height 1.5 in Gaussian noise,
    1.5 / variance times the observation is calibrated; logits are that times a temperature.
    """
    rng = np.random.default_rng(8)
    labels = rng.integers(0, C, N)
    logits = np.empty((3, N, C), np.float32)
    common = rng.standard_normal((N, C))
    for g, (temperature, own) in enumerate(zip(TEMPERATURES, (0.9, 0.6, 0.4), strict=True)):
        noise = (common + own * rng.standard_normal((N, C))) / 1.3
        seen = 1.5 * (labels[:, None] == np.arange(C)) + noise
        logits[g] = temperature * 1.5 / ((1 + own**2) / 1.3**2) * seen
    return logits, labels


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays")
    logits, labels = arrays
    np.save(path / "logits.npy", logits)
    np.save(path / "softmax.npy", softmax(logits.astype(float), 2).astype(np.float32))
    np.save(path / "gt.npy", labels)
    return path


def run(folder, *argv, kind="logits"):
    files = [f"--{kind}={folder}/{kind}.npy", f"--gt={folder}/gt.npy"]
    dims = f"--dims={','.join(map(str, DIMS))}"
    assert analyze.main([*files, dims, *argv, f"--output={folder}/out.json", f"--seed={SEED}"]) == 0
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def answers(arrays):
    """(confidence [3, N], correct [3, N]), in NumPy for all images at once."""
    logits, labels = arrays
    probabilities = softmax(logits, 2)
    return probabilities.max(2), probabilities.argmax(2) == labels


def left_at(confidence, thresholds, i):
    return next((g for g, t in enumerate(thresholds) if confidence[g, i] > t), len(thresholds))


def spread(values, digits=4):
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return {
        "mean": pytest.approx(mean, abs=10**-digits),
        "std": pytest.approx(deviation, abs=10**-digits),
    }


# ---------------------------------------------------------------- cascades


def test_the_caps_of_a_cascade_against_loops(folder, answers):
    confidence, correct = answers
    found = run(folder, "--only=cascade", f"--splits={SPLITS}", "--learn=0.25")["cascade"]
    rows = {
        (cap, key): []
        for cap in range(3)
        for key in ("top1", "expected_dim", "cumulative_dim", "threshold")
    }
    for mine, rest in split_indices(N, SPLITS, 300, SEED):
        thresholds = learn_thresholds(confidence[:, mine], correct[:, mine])
        for cap in range(3):
            at = [(min(left_at(confidence, thresholds, i), cap), i) for i in rest]
            rows[cap, "top1"].append(100 * sum(correct[g, i] for g, i in at) / len(rest))
            rows[cap, "expected_dim"].append(sum(DIMS[g] for g, _ in at) / len(rest))
            rows[cap, "cumulative_dim"].append(sum(sum(DIMS[: g + 1]) for g, _ in at) / len(rest))
            if cap:
                rows[cap, "threshold"].append(
                    thresholds[cap - 1]
                )  # on the way from the prefix before it
    assert rows[1, "threshold"] != rows[2, "threshold"]
    for cap, shown in enumerate(found["caps"]):
        assert shown["dim"] == DIMS[cap], f"cap {cap}: length"
        for key in ("top1", "expected_dim", "cumulative_dim"):
            assert shown[key] == spread(rows[cap, key]), (cap, key)
        assert shown["threshold"] == (spread(rows[cap, "threshold"]) if cap else None), (
            f"cap {cap}: thresholds differ from the loop"
        )
    assert (
        found["caps"][2]["cumulative_dim"]["mean"] > found["caps"][2]["expected_dim"]["mean"] + 8
    ), "cumulative dim must count every prefix that was asked"


def test_certificates_are_measured_on_the_other_half(folder, answers, capsys):
    confidence, correct = answers
    epsilons = [2.0, 4.0, 9.0]
    flags = [
        f"--epsilon={','.join(map(str, epsilons))}",
        "--delta=0.9",
        f"--splits={SPLITS}",
    ]  # much may be lost
    found = run(folder, "--only=cascade", *flags)["cascade"]["certified"]
    shown = capsys.readouterr().out
    assert [c["epsilon"] for c in found] == epsilons
    counts = []
    for row, points in zip(found, epsilons, strict=True):
        options = {"epsilon": points / 100, "delta": 0.9, "seed": SEED}
        whole = certify(confidence, correct, DIMS, **options)
        assert row["certified"] == whole.certified, f"epsilon {points}: another certificate"
        assert row["expected_dim"] == pytest.approx(whole.expected_dim), (
            f"epsilon {points}: expected dim differs"
        )
        assert row["loss_bound"] == pytest.approx(100 * whole.loss_bound, abs=1e-4), (
            f"epsilon {points}: bound differs"
        )
        losses, lengths, same_half = [], [], []
        for mine, rest in split_indices(N, SPLITS, N // 2, SEED):
            thresholds = certify(confidence[:, mine], correct[:, mine], DIMS, **options).thresholds
            for part, place in ((rest, losses), (mine, same_half)):
                at = [(left_at(confidence, thresholds, i), i) for i in part]
                place.append(
                    100
                    * (sum(correct[-1, i] for i in part) - sum(correct[g, i] for g, i in at))
                    / len(part)
                )
            lengths.append(sum(DIMS[left_at(confidence, thresholds, i)] for i in rest) / len(rest))
        above = sum(loss > points for loss in losses)
        counts.append((above, sum(loss > points / 100 for loss in losses)))
        assert row["held_out"] == {
            "loss": spread(losses),
            "expected_dim": spread(lengths),
            "above": above,
        }, f"epsilon {points}: held-out numbers differ from the loop"
        assert abs(np.mean(losses)) > 0.01, "losses near 0 would hide a wrong sign"
        assert abs(np.mean(losses) - np.mean(same_half)) > 1e-3, (
            "both halves lose the same: the test cannot tell them apart"
        )
        assert (
            f"{np.mean(losses):.2f} lost, above {points:g} in {above} of {SPLITS} splits" in shown
        )
    assert any(0 < above < of_points_as_fraction for above, of_points_as_fraction in counts), (
        "no split tells points from fractions"
    )


# ---------------------------------------------------------------- oracle and calibration


def test_the_majority_against_loops(folder, arrays):
    logits, labels = arrays
    said = logits.argmax(2)
    right = some = 0
    for i, label in enumerate(labels):
        votes = said[:, i].tolist()
        most = max(votes.count(c) for c in votes)
        right += [c for c in votes if votes.count(c) == most][
            -1
        ] == label  # equal votes: as the longest of them says
        some += label in votes
    found = run(folder, "--only=oracle")["oracle"]
    assert found["majority_top1"] == pytest.approx(100 * right / N, abs=1e-3), (
        "majority vote differs from the loop"
    )
    assert found["top1"] == pytest.approx(100 * some / N, abs=1e-3), (
        "oracle accuracy differs from the loop"
    )
    assert right < some, "majority and oracle are equal: the test cannot tell them apart"


def fitted(logits, labels):
    """The temperature with the lowest negative log-likelihood."""

    def likelihood(t):
        return -log_softmax(logits.astype(float) / t, 1)[np.arange(len(labels)), labels].mean()

    return optimize.minimize_scalar(
        likelihood, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-8}
    ).x


def calibration_error(confidence, correct, bins=15):
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins]
        total += abs(
            sum(float(confidence[i]) for i in inside) - sum(bool(correct[i]) for i in inside)
        )
    return 100 * total / len(confidence)


@pytest.mark.parametrize("kind", ["logits", "softmax"])
@pytest.mark.parametrize("most", [5000, 200])
def test_temperatures_are_fitted_and_evaluated_on_different_parts(
    folder, arrays, answers, monkeypatch, *, kind, most
):
    """Softmax gives the same numbers as logits: its logarithm differs by a constant per image."""
    monkeypatch.setattr(analyze, "MAX_FIT_IMAGES", most)
    logits, labels = arrays
    found = run(folder, "--only=calibration", kind=kind)["calibration"]
    ((fit, rest),) = split_indices(N, 1, min(most, N // 2), SEED)
    apart = []
    for g, row in enumerate(found.values()):
        temperature = fitted(logits[g, fit], labels[fit])
        assert row["temperature"] == pytest.approx(temperature, abs=2e-4), (
            f"prefix {g}: temperature differs from SciPy"
        )
        apart.append(abs(temperature - fitted(logits[g, rest], labels[rest])))
        assert temperature == pytest.approx(TEMPERATURES[g], rel=0.25), (
            f"prefix {g}: temperature is far from the one of the data"
        )
        cooled = softmax(logits[g, rest].astype(float) / temperature, 1).max(1)
        before = calibration_error(answers[0][g, rest], answers[1][g, rest])
        after = calibration_error(cooled, answers[1][g, rest])
        assert row["held_out_ece"] == pytest.approx(before, abs=2e-3), (
            f"prefix {g}: ECE before scaling"
        )
        # 0.3: an image may be on the edge of a bin
        assert row["held_out_ece_after"] == pytest.approx(after, abs=0.3), (
            f"prefix {g}: ECE after scaling"
        )
        assert after < before - 1, f"prefix {g}: scaling did not help"
    assert max(apart) > 0.01, (
        "both parts have the same temperature: the test cannot tell them apart"
    )


# ---------------------------------------------------------------- which arrays, read as what


def files(folder, kind, dims=DIMS):
    return from_files(
        dict.fromkeys(("logits", "softmax", "predictions"))
        | {kind: f"{folder}/{kind}.npy", "gt": f"{folder}/gt.npy", "dims": tuple(dims)}
    )


def test_logits_of_softmax_are_its_logarithm(folder, arrays):
    images = np.array([5, 3, 1100])
    for g in range(3):
        np.testing.assert_array_equal(
            files(folder, "logits").logits(g, images), arrays[0][g, images]
        )
        expected = log_softmax(arrays[0][g, images].astype(float), 1)
        found = files(folder, "softmax").logits(g, images)
        np.testing.assert_allclose(
            found[expected > -80], expected[expected > -80], rtol=1e-4, atol=1e-4
        )
        assert np.isfinite(found).all()


def test_a_probability_of_zero_has_a_logarithm(tmp_path):
    np.save(tmp_path / "softmax.npy", np.array([[[1, 0, 0], [0.5, 0.5, 0]]], np.float32))
    np.save(tmp_path / "gt.npy", np.array([0, 1]))
    found = files(tmp_path, "softmax", [8]).logits(0, np.arange(2))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(softmax(found, 1), [[1, 0, 0], [0.5, 0.5, 0]], atol=1e-6)


def write_results(folder, kinds, names=None, dims=DIMS):
    arrays = {kind: f"{kind}.npy" for kind in (*kinds, "gt")}
    results = {
        "prefixes": {str(d): {"top1": 0.0} for d in dims},
        "arrays": arrays,
        "class_names": names,
    }
    about = {
        "checkpoint": "m",
        "arch": "resnet10",
        "head": "mrl",
        "dataset": "V1",
        "data": "v",
        "images": N,
        "classes": C,
    }
    (folder / "results.json").write_text(json.dumps(results | about))
    return folder / "results.json"


def test_logits_are_preferred_then_softmax(folder, arrays):
    """The predictions are all wrong, so that their use would show."""
    np.save(folder / "predictions.npy", (np.stack([arrays[1]] * 3) + 1) % C)
    for kinds, used in (
        (("predictions", "softmax", "logits"), "logits"),
        (("predictions", "logits"), "logits"),
        (("softmax", "predictions"), "softmax"),
        (("predictions",), "predictions"),
    ):
        found = from_results(write_results(folder, kinds))
        predictions, confidence = found.answers()
        if used == "predictions":
            assert found.scores is None
            assert not (predictions == arrays[1]).any()
            assert np.isnan(confidence).all()
            continue
        assert found.scores is not None
        assert found.are_logits == (used == "logits")
        np.testing.assert_array_equal(found.scores, np.load(folder / f"{used}.npy"))
        np.testing.assert_array_equal(predictions, arrays[0].argmax(2))


@pytest.mark.parametrize("dims", ["0,32,128", "-8,32,128", "8,8,32"])
def test_lengths_are_positive_and_increase(folder, capsys, dims):
    with pytest.raises(SystemExit) as end:
        run(folder, "--only=oracle", f"--dims={dims}")
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert "\n" not in said
    assert f"--dims {dims}" in said


@pytest.mark.parametrize(("value", "names"), [(-1, False), (-1, True), (C, True), (2**40, True)])
def test_predictions_are_of_the_classes(tmp_path, arrays, capsys, value, names):
    predictions = arrays[0].argmax(2)
    predictions[1, 7] = value
    np.save(tmp_path / "predictions.npy", predictions)
    np.save(tmp_path / "gt.npy", arrays[1])
    results = write_results(
        tmp_path, ["predictions"], [f"class {c}" for c in range(C)] if names else None
    )
    with pytest.raises(SystemExit) as end:
        analyze.main([f"--results={results}", "--only=oracle", f"--output={tmp_path / 'a.json'}"])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert "\n" not in said
    assert "predictions.npy" in said
    assert not (tmp_path / "a.json").exists()
    predictions[1, 7] = C - 1
    np.save(tmp_path / "predictions.npy", predictions)
    assert from_results(results).num_classes == C, "classes must come from the names"


def test_a_thousand_classes_without_names_are_imagenets(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 12)
    torch.save(torch.from_numpy(softmax(rng.standard_normal((2, 12, 1000)), 2)), tmp_path / "s.pth")
    torch.save(torch.from_numpy(labels), tmp_path / "gt.pth")
    options = [
        f"--softmax={tmp_path}/s.pth",
        f"--gt={tmp_path}/gt.pth",
        "--dims=8,16",
        f"--output={tmp_path}/a.json",
    ]
    assert analyze.main([*options, "--only=trends,superclasses", "--superclasses=dog,bird"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["name"] for row in found["per_class"]] == imagenet_sets.wnids()
    assert found["per_class"][207]["shown"] == "golden retriever"
    assert found["superclasses"]["names"] == ["other", "dog", "bird"]
    assert sum(found["superclasses"]["classes"]) == 1000, "every class has one group"
