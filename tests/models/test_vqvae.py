"""The VQ-VAE: nearest codes, moving averages, files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from matryoshka.models import ModelError
from matryoshka.models.vqvae import (
    FORMAT,
    Codebook,
    EncoderSizes,
    VqVae,
    checked_sizes,
    read_encoder,
    save_vqvae,
)

SMALL = EncoderSizes(patch=4, hiddens=8, residual_hiddens=4, residual_layers=2, code_dim=3)


@settings(max_examples=20)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 1000))
def test_every_position_gets_its_nearest_code(count, dim, seed):
    torch.manual_seed(seed)
    book = Codebook(count, dim).eval()
    z = torch.randn(2, dim, 2, 3)
    found = book(z)
    codes = book.codes.numpy()
    distances = np.zeros((2, 2, 3))
    used = np.zeros(count)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                vector = z[b, :, y, x].numpy()
                to_each = [np.sum((vector - code) ** 2) for code in codes]
                nearest = int(np.argmin(to_each))
                assert found.indices[b, y, x] == nearest
                np.testing.assert_allclose(
                    found.codes[b, :, y, x], codes[nearest], rtol=1e-4, atol=1e-5
                )
                distances[b, y, x] = to_each[nearest] / dim
                used[nearest] += 1
    np.testing.assert_allclose(found.commitment, distances.mean(), rtol=1e-4)
    share = used[used > 0] / used.sum()
    np.testing.assert_allclose(found.perplexity, np.exp(-np.sum(share * np.log(share))), rtol=1e-4)


def test_the_gradient_passes_the_codes_unchanged():
    z = torch.randn(2, 3, 2, 2, requires_grad=True)
    weights = torch.randn(2, 3, 2, 2)
    (Codebook(5, 3)(z).codes * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_codes_follow_the_mean_of_what_they_stand_for():
    """The formulas of appendix A.1: N <- decay N + (1 - decay) n, m likewise, code = m / N."""
    torch.manual_seed(0)
    book = Codebook(4, 2, decay=0.9)
    usage = np.array([30.0, 40.0, 20.0, 10.0])
    sums = book.codes.numpy() * usage[:, None]
    book.usage.copy_(torch.from_numpy(usage))
    book.sums.copy_(torch.from_numpy(sums))
    for _ in range(3):
        z = torch.randn(5, 2, 2, 3)
        codes = book.codes.numpy().copy()
        book(z)
        counted, summed = np.zeros(4), np.zeros((4, 2))
        for vector in z.permute(0, 2, 3, 1).reshape(-1, 2).numpy():
            nearest = int(np.argmin([np.sum((vector - code) ** 2) for code in codes]))
            counted[nearest] += 1
            summed[nearest] += vector
        usage = 0.9 * usage + 0.1 * counted
        sums = 0.9 * sums + 0.1 * summed
        np.testing.assert_allclose(book.usage, usage, rtol=1e-5)
        np.testing.assert_allclose(book.codes, sums / usage[:, None], rtol=1e-4)


def test_unused_codes_restart_at_outputs_of_the_encoder():
    torch.manual_seed(0)
    book = Codebook(8, 2)
    book.codes.fill_(100.0)
    z = torch.randn(4, 2, 3, 3)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 2)
    book(z)
    used = book.codes[book.codes[:, 0] < 99]
    assert len(used) >= 7, "codes far from all outputs stay where they are"
    gaps = (used[:, None] - vectors).abs().amax(2).amin(1)
    torch.testing.assert_close(gaps, torch.zeros(len(used)), rtol=0, atol=1e-5)
    assert book(z).perplexity > 3


def test_evaluation_changes_no_code():
    book = Codebook(4, 3).eval()
    before = {key: value.clone() for key, value in book.state_dict().items()}
    book(torch.randn(2, 3, 2, 2))
    assert all(torch.equal(before[key], value) for key, value in book.state_dict().items())


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_an_image_becomes_one_code_per_patch_and_an_image_again(patch):
    model = VqVae(EncoderSizes(patch, 8, 4, 1, 5), codes=6)
    images = torch.randn(2, 3, 16, 16)
    assert model.encoder(images).shape == (2, 5, 16 // patch, 16 // patch)
    result = model(images)
    assert result.images.shape == images.shape
    torch.testing.assert_close(result.error, (result.images - images).square().mean())


def test_every_residual_layer_has_weights_of_its_own():
    model = VqVae(SMALL, codes=4)
    keys = [key for key in model.encoder.state_dict() if "conv1" in key]
    assert len(keys) == 2
    shapes = {tuple(model.encoder.state_dict()[key].shape) for key in keys}
    assert shapes == {(4, 8, 3, 3)}
    first, second = (model.encoder.state_dict()[key] for key in keys)
    assert not torch.equal(first, second)


def test_steps_lower_the_error():
    torch.manual_seed(0)
    model = VqVae(SMALL, codes=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = torch.randn(16, 3, 1, 1).expand(16, 3, 8, 8).contiguous()
    errors = []
    for _ in range(100):
        result = model(images)
        optimizer.zero_grad()
        (result.error + 0.25 * result.commitment).backward()
        optimizer.step()
        errors.append(result.error.item())
    assert np.mean(errors[-5:]) < 0.7 * errors[0]


def test_a_file_holds_the_encoder(tmp_path):
    model = VqVae(SMALL, codes=4)
    path = tmp_path / "vqvae.safetensors"
    save_vqvae(model, path, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    stored = read_encoder(path)
    assert (stored.sizes, stored.mean, stored.std) == (SMALL, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(stored.encoder(images), model.encoder(images))
    with torch.device("meta"):
        assert read_encoder(path).sizes == SMALL


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "not a VQ-VAE"),
        ({"sizes": {"patch": 4}}, "code_dim"),
        ({"sizes": {"patch": 3}}, "power of two"),
        ({"sizes": {"hiddens": 10**9}}, "hiddens=1000000000"),
        ({"sizes": {"hiddens": 16}}, "do not fit"),
        ({"sizes": [1, 2]}, "not a whole VQ-VAE"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0.0, 1.0, 1.0]}, "do not fit"),
        ({"mean": None}, "not a whole VQ-VAE"),
    ],
)
def test_a_file_that_is_no_vqvae_is_one_line(tmp_path, change, words):
    path = tmp_path / "vqvae.safetensors"
    save_vqvae(VqVae(SMALL, codes=4), path, (0.5,) * 3, (0.5,) * 3)
    complete = {
        "format": FORMAT,
        "sizes": vars(SMALL),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    if isinstance(change.get("sizes"), dict) and len(change["sizes"]) == 1 and words != "code_dim":
        change = {"sizes": vars(SMALL) | change["sizes"]}
    save_file(load_file(path), path, {"matryoshka": json.dumps(complete | change)})
    with pytest.raises(ModelError) as error:
        read_encoder(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "vqvae.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"vqvae\.safetensors"):
        read_encoder(path)


def test_sizes_are_checked():
    assert checked_sizes(vars(SMALL)) == SMALL
    with pytest.raises(ModelError, match="power of two"):
        checked_sizes(vars(SMALL) | {"patch": 1})
