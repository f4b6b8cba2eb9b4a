"""The classifiers that learn beside a run: what they learn, and what they leave alone."""

import copy

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from matryoshka.evaluation.online_probe import OnlineProbe
from matryoshka.training.optim import parameter_groups

DIMS = (2, 8)


def batches(count, seed=0, size=64):
    """Features [size, 8] of 3 classes, not centred and of different sizes, with their labels."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    for _ in range(count):
        labels = torch.randint(0, 3, (size,), generator=rng)
        noise = torch.randn(size, 8, generator=rng)
        yield 50 * (centres[labels] + noise) + 100, labels


def test_it_approaches_the_converged_classifier():
    probe = OnlineProbe(DIMS, 3, lr=1e-2)
    for features, labels in batches(300):
        probe.update(features, labels)
    train = list(batches(20, seed=1))
    x, y = (torch.cat([pair[part] for pair in train]) for part in range(2))
    test_x, test_y = next(batches(1, seed=2, size=1000))
    right, labelled = probe.answers(test_x, test_y)
    assert float(labelled) == 1000
    for d, found in zip(DIMS, (100 * right / labelled).tolist(), strict=True):
        oracle = LogisticRegression(max_iter=1000).fit((x[:, :d] - 100) / 50, y)
        converged = 100 * oracle.score((test_x[:, :d] - 100) / 50, test_y)
        assert found == pytest.approx(converged, abs=2), f"prefix {d}"
    assert right[1] > right[0] + 50, "the longer prefix knows more: else the test is vacuous"


def test_no_gradient_reaches_the_features_and_no_parameter_the_optimizer_of_the_run():
    encoder = nn.Linear(8, 8)
    probe = OnlineProbe(DIMS, 3)
    features, labels = next(batches(1))
    embeddings = encoder(features)
    probe.update(embeddings, labels)
    assert encoder.weight.grad is None
    assert not probe(embeddings).requires_grad
    (embeddings.sum() + probe(embeddings).sum()).backward()
    whole = encoder.weight.grad.clone()
    encoder.weight.grad = None
    encoder(features).sum().backward()
    assert torch.equal(whole, encoder.weight.grad)
    run = nn.ModuleList([encoder, probe])
    groups = parameter_groups(run, 0.1, 0.1)
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in encoder.parameters()}
    assert all(p.grad is None for p in probe.parameters())


def test_the_modes_of_the_encoder_are_its_own():
    encoder = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    probe = OnlineProbe(DIMS, 3)
    features, labels = next(batches(1))
    for mode in (True, False):
        encoder.train(mode)
        probe.update(encoder(features), labels)
        probe.answers(encoder(features), labels)
        assert encoder[1].training is mode


def test_the_step_is_adamw_on_the_mean_cross_entropy():
    probe = OnlineProbe((8,), 3, lr=0.1, weight_decay=0.01)
    oracle = nn.Linear(8, 3)
    nn.init.zeros_(oracle.weight)
    nn.init.zeros_(oracle.bias)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=0.1, weight_decay=0.01)
    for features, labels in batches(5):
        labels[:9] = -1
        probe.update(features, labels)
        x = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
        loss = nn.functional.cross_entropy(oracle(x[9:]), labels[9:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(probe.head.heads[0].weight, oracle.weight, check_stride=False)
    torch.testing.assert_close(probe.head.heads[0].bias, oracle.bias)


def test_a_resumed_probe_makes_the_same_steps():
    """Its state is tensors alone, as the checkpoints of a run take them."""
    first = OnlineProbe(DIMS, 3)
    steps = list(batches(6))
    for features, labels in steps[:3]:
        first.update(features, labels)
    state = copy.deepcopy(first.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    second = OnlineProbe(DIMS, 3)
    second.load_state_dict(state)
    for features, labels in steps[3:]:
        first.update(features, labels)
        second.update(features, labels)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    fresh = OnlineProbe(DIMS, 3)
    fresh.head.load_state_dict(first.head.state_dict())
    fresh.update(*steps[0])
    first.update(*steps[0])
    assert not torch.equal(fresh.head.heads[1].weight, first.head.heads[1].weight), (
        "the optimizer's state changes nothing: the test is vacuous"
    )


def test_images_without_labels_count_for_nothing():
    features, labels = next(batches(1))
    probe = OnlineProbe(DIMS, 3)
    right, labelled = probe.update(features, torch.full_like(labels, -1))
    assert (right.tolist(), float(labelled)) == ([0, 0], 0)
    assert all(not bool(p.any()) for p in probe.parameters()), "a step without a label"
    labels[10:] = -1
    right, labelled = probe.answers(features, labels)
    assert float(labelled) == 10
    expected = [int((logits.argmax(1) == labels)[:10].sum()) for logits in probe(features)]
    assert right.tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_diverging_run_does_not_break_it(bad):
    probe = OnlineProbe(DIMS, 3)
    features, labels = next(batches(1))
    broken = features.clone()
    broken[3] = bad
    probe.update(broken, labels)
    assert all(bool(torch.isfinite(value).all()) for value in probe.head.state_dict().values())


def test_a_batch_of_one_image_and_half_precision():
    probe = OnlineProbe(DIMS, 3)
    features, labels = next(batches(1))
    right, labelled = probe.update(features[:1], labels[:1])
    assert (right.tolist(), float(labelled)) == ([0, 0], 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        probe.update(features.bfloat16(), labels)
        assert probe(features).dtype == torch.float32
    assert bool(probe.head.heads[1].weight.any())
