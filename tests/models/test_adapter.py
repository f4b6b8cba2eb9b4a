"""Adapters: PCA against scikit-learn, their file, and what comes of a damaged one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from matryoshka.checkpoint.adapter_file import load_adapter, save_adapter
from matryoshka.models.adapter import (
    Adapter,
    AdapterError,
    AdapterSpec,
    discriminant_adapter,
    pca_adapter,
    random_adapter,
)

SPEC = AdapterSpec(width=6, dims=(2, 4))


def rows(count=50, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) * np.arange(1, width + 1) + 3).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_pca_is_scikit_learns_of_rows_of_length_1(width, seed):
    x = rows(60, width, seed)
    adapter = pca_adapter(x, AdapterSpec(width, (1, width)))
    expected = PCA().fit(unit(x.astype(np.float64))).transform(unit(x.astype(np.float64)))
    found = adapter.apply_to(x)
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, atol=2e-5)
    largest = adapter.weight[torch.arange(width), adapter.weight.abs().argmax(1)]
    assert bool((largest > 0).all()), "the signs must be the same on every machine"


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(2, 5), st.integers(0, 1000))
def test_a_discriminant_analysis_solves_the_generalised_eigenproblem(width, classes, seed):
    x = rows(80, width, seed)
    labels = np.random.default_rng(seed).integers(0, classes, 80)
    u = unit(x.astype(np.float64))
    within, between = np.zeros((width, width)), np.zeros((width, width))
    for c in range(classes):
        own = u[labels == c]
        offset = own.mean(0) - u.mean(0)
        within += (own - own.mean(0)).T @ (own - own.mean(0)) / 80
        between += len(own) / 80 * np.outer(offset, offset)
    shrunk = within + 0.3 * np.trace(within) / width * np.eye(width)
    values, vectors = scipy.linalg.eigh(between + 1e-3 * within, shrunk)
    found = discriminant_adapter(x, labels, AdapterSpec(width, (width,))).weight.detach().numpy()
    np.testing.assert_allclose(found @ shrunk @ found.T, np.eye(width), atol=1e-4)
    ratios = np.diag(found @ (between + 1e-3 * within) @ found.T)
    np.testing.assert_allclose(ratios, values[::-1], atol=1e-5)
    assert abs(found[0] @ shrunk @ vectors[:, -1]) == pytest.approx(1, abs=1e-2)


def test_classes_without_two_embeddings_tell_nothing():
    with pytest.raises(AdapterError, match="no class has two"):
        discriminant_adapter(rows(30), np.arange(30), SPEC)


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_scale_of_an_embedding_does_not_matter(hidden):
    x = rows()
    adapter = pca_adapter(x, replace(SPEC, hidden=hidden))
    np.testing.assert_allclose(adapter.apply_to(7 * x), adapter.apply_to(x), atol=1e-6)
    assert adapter.apply_to(x).shape == (50, 4)
    assert adapter.apply_to(x.astype(np.float16)).dtype == np.float32
    assert np.isfinite(adapter.apply_to(np.zeros((1, 6), np.float32))).all()


def test_a_residual_adapter_starts_as_its_linear_map():
    x = rows()
    linear = pca_adapter(x, SPEC)
    residual = pca_adapter(x, replace(SPEC, hidden=16))
    np.testing.assert_array_equal(residual.apply_to(x), linear.apply_to(x))
    assert residual.sha256() != linear.sha256()
    value = residual(torch.from_numpy(x)).square().sum()
    value.backward()
    assert residual.second.weight.grad is not None
    assert residual.second.weight.grad.abs().sum() > 0, "the network must be able to learn"


def test_a_random_rotation_keeps_all_cosines_at_full_width():
    x = rows()
    spec = AdapterSpec(6, (2, 6))
    first, again, other = (random_adapter(spec, seed) for seed in (3, 3, 4))
    assert first.sha256() == again.sha256() != other.sha256()
    found = first.apply_to(x)
    np.testing.assert_allclose(found @ found.T, unit(x) @ unit(x).T, atol=1e-5)


def test_fewer_rows_than_numbers_are_refused():
    with pytest.raises(AdapterError, match="6 embeddings to fit to, of 6 numbers"):
        pca_adapter(rows(6), SPEC)


def test_rows_of_another_width_are_refused():
    with pytest.raises(AdapterError, match="embeddings of 6"):
        pca_adapter(rows(), SPEC).apply_to(rows(9, 5))


# ---------------------------------------------------------------- the file


@pytest.fixture
def saved(tmp_path):
    encoder = {"file": "m.safetensors", "weights_sha256": "ab" * 32}
    spec = AdapterSpec(6, (2, 4), hidden=3, method="pca", encoder=encoder)
    torch.manual_seed(0)
    adapter = pca_adapter(rows(), spec)
    torch.nn.init.normal_(adapter.second.weight)
    save_adapter(tmp_path / "a.safetensors", adapter, {"seed": 1})
    return tmp_path / "a.safetensors", adapter


def test_a_file_gives_the_adapter_back(saved):
    path, adapter = saved
    found = load_adapter(path)
    assert found.spec == adapter.spec
    assert found.sha256() == adapter.sha256()
    np.testing.assert_array_equal(found.apply_to(rows()), adapter.apply_to(rows()))
    assert not any(p.requires_grad for p in found.parameters())
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["matryoshka"])
    assert facts["about"] == {"seed": 1}
    assert facts["adapter"]["method"] == "pca"


def with_facts(path, change):
    """The file with other metadata."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["matryoshka"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    change(facts, tensors)
    save_file(tensors, path, {"matryoshka": json.dumps(facts)})


DAMAGES = {
    "another width": lambda facts, _: facts["adapter"].update(width=7),
    "a huge width": lambda facts, _: facts["adapter"].update(width=1 << 19, dims=[1 << 19]),
    "dims of text": lambda facts, _: facts["adapter"].update(dims="24"),
    "dims that fall": lambda facts, _: facts["adapter"].update(dims=[4, 2]),
    "no dims": lambda facts, _: facts["adapter"].pop("dims"),
    "unknown key": lambda facts, _: facts["adapter"].update(more=1),
    "unknown method": lambda facts, _: facts["adapter"].update(method="magic"),
    "an encoder of text": lambda facts, _: facts["adapter"].update(encoder="x"),
    "a weight too few": lambda _, tensors: tensors.pop("mean"),
    "NaN": lambda _, tensors: tensors["weight"].fill_(float("nan")),
    "other numbers": lambda _, tensors: tensors["weight"].add_(1),
    "float64": lambda _, tensors: tensors.update(weight=tensors["weight"].double()),
    "another format": lambda facts, _: facts.update(format="matryoshka-2"),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused(saved, change):
    path, _ = saved
    with_facts(path, change)
    with pytest.raises(AdapterError) as error:
        load_adapter(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=30)
@given(st.data())
def test_a_file_with_a_changed_byte_is_refused_or_the_same(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    adapter = pca_adapter(rows(), SPEC)
    save_adapter(path, adapter, {})
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(at + 1, len(content)))])
    try:
        found = load_adapter(path)
    except AdapterError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert found.sha256() == adapter.sha256(), "a change of a weight went unnoticed"


def test_files_that_are_no_adapters(tmp_path):
    with pytest.raises(AdapterError, match="no such adapter file"):
        load_adapter(tmp_path / "none")
    (tmp_path / "text").write_text("adapter")
    with pytest.raises(AdapterError, match="not a whole adapter"):
        load_adapter(tmp_path / "text")
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(AdapterError, match="is not an adapter"):
        load_adapter(tmp_path / "other")


def test_the_identity_covers_kind_and_weights():
    first = pca_adapter(rows(), SPEC)
    second = Adapter(SPEC)
    second.load_state_dict(first.state_dict())
    assert first.sha256() == second.sha256()
    with torch.no_grad():
        second.mean[0] += 1e-3
    assert first.sha256() != second.sha256()
