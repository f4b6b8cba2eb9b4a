"""Self-supervised methods: gradients, targets, queues, schedules, and one step of each."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import MRL
from matryoshka import losses
from matryoshka.distributed import World
from matryoshka.models import ModelSpec, build
from matryoshka.ssl import METHODS, SslConfig, make_method, momentum_at
from matryoshka.ssl import options as ssl_options
from matryoshka.ssl.projector import SlicedProjector
from matryoshka.ssl.queue import KeyQueue
from matryoshka.ssl.towers import LearnedTemperature, Towers
from matryoshka.training import ssl_step

DIMS = (8, 16, 32)
OPTIONS = {
    "relic": {"learn_temperature": True, "temperature": (0.5,), "least_temperature": 0.1},
    "moco": {"queue": 24},
    "simclr": {"temperature": (0.2, 0.3, 0.4)},
    "vicreg": {"projector": "mrl-e"},
    "sigreg": {"projector": "none", "directions": 16},
}


def method_of(name, **options):
    torch.manual_seed(0)
    spec = ModelSpec("fast_cnn", 10, DIMS, arch_options={"dim": 32})
    chosen = {"hidden": 16, "out": 8, **OPTIONS.get(name, {}), **options}
    return make_method(build(spec), SslConfig(method=name, **chosen))


def views_of(count=2, images=8, small=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [32] * count + [16] * small
    return [torch.randn(images, 3, size, size, generator=generator) for size in sizes]


def one_loss(method, views, large=2):
    queries = [views[v] for v in method.query_views(len(views), large)]
    keys = [views[v] for v in method.key_views(large)]
    own = method(queries, keys)
    generator = torch.Generator().manual_seed(5)
    return own, method.loss(own, own, first=0, generator=generator)


def test_the_names_are_those_of_the_options():
    assert tuple(METHODS) == ssl_options.METHODS
    assert losses.STOP_GRADIENTS == ssl_options.STOP_GRADIENTS


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_is_trained_gets_a_gradient_and_the_target_none(name):
    method = method_of(name)
    own, (loss, per_prefix) = one_loss(method, views_of())
    loss.backward()
    assert per_prefix.shape == (len(DIMS),)
    for path, parameter in method.named_parameters():
        is_trained = not path.startswith("target.") and ".head." not in path
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_trained, path
    assert not own.features.requires_grad
    assert all(not x.requires_grad for x in own.target)


@pytest.mark.parametrize("name", ssl_options.WITH_TARGET)
@pytest.mark.parametrize("projector", ssl_options.PROJECTORS)
def test_a_predictor_sees_each_prefix_alone(name, projector):
    """Each block of the online tensor faces the same columns of the target's."""
    method = method_of(name, projector=projector, predictor=True)
    own, (loss, _) = one_loss(method, views_of())
    assert own.online[0].shape == own.target[0].shape
    loss.backward()
    for part in method.predictor.parts:
        last = part[-1].weight.grad
        assert bool((last.abs().sum(1) > 0).all()), "an output that nothing reads"


def test_keys_know_their_group_alone():
    """Batch norm of the target mixes groups of a batch, and gives the images in their order."""
    method = method_of("moco")
    (images, _) = views_of(images=8)
    changed = torch.cat([images[:4], torch.randn_like(images[4:])])
    for together, same in ((4, True), (0, False)):
        _, keys = method.target(images, together)
        _, other = method.target(changed, together)
        assert torch.equal(keys[:4], other[:4]) == same
    _, apart = method.target(images[4:])
    assert torch.equal(method.target(images, 4)[1][4:], apart)
    # 9 images are groups of 5 and 4: none of one image, which has no statistics
    assert len(method.target(torch.cat([images, images[:1]]), 4)[1]) == 9


def test_shuffled_keys_come_back_in_the_order_of_the_images():
    world = World(torch.device("cpu"))
    rows = torch.arange(6.0)[:, None]
    order = ssl_step.key_order(shuffling(method="moco"), world, 6, np.random.default_rng(0))
    keys = ssl_step.reordered(rows, order, world)
    assert not torch.equal(keys, rows)
    own = Towers([rows], [keys], keys)
    found = ssl_step.of_all_ranks(own, order, world, target_features=True)
    assert torch.equal(found.target[0], rows)
    assert torch.equal(found.features, rows)


@pytest.mark.parametrize(
    ("options", "ranks", "expected"),
    [
        ({"method": "moco"}, 1, 64),
        ({"method": "moco"}, 2, 0),
        ({"method": "moco", "bn_group": 16}, 2, 16),
        ({"method": "moco", "version": 3}, 1, 0),
        ({"method": "moco", "shuffle_bn": False}, 1, 0),
        ({"method": "byol"}, 1, 0),
    ],
)
def test_the_groups_of_keys(options, ranks, expected):
    world = World(torch.device("cpu"), size=ranks)
    assert ssl_step.bn_group(shuffling(**options), world) == expected


def shuffling(**options):
    return SimpleNamespace(ssl=SslConfig(**options))


def test_skipped_keys_do_not_enter_the_queue():
    queue = KeyQueue(6, 2)
    before = queue.keys.clone()
    queue.push(torch.full((4, 2), math.nan), torch.tensor(True))
    assert torch.equal(queue.keys, before)
    assert int(queue.position) == 0
    queue.push(torch.ones(4, 2), torch.tensor(False))
    assert queue.keys[:4].eq(1).all()
    assert int(queue.position) == 4


@pytest.mark.parametrize("name", METHODS)
def test_a_step_lowers_the_loss_at_every_prefix(name):
    method = method_of(name)
    views = views_of()
    method.eval()  # the same statistics before and after
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    _, (loss, before) = one_loss(method, views)
    loss.backward()
    optimizer.step()
    _, (_, after) = one_loss(method, views)
    assert float(after.sum()) < float(before.sum())


@pytest.mark.parametrize("name", ssl_options.MULTI_CROP)
def test_small_views(name):
    method = method_of(name, **({"stop_gradient": "second"} if name == "relic" else {}))
    views = views_of(small=2)
    own, (loss, _) = one_loss(method, views)
    _, (without, _) = one_loss(method, views[:2])
    assert len(own.online) == len(method.query_views(4, 2))
    assert all(len(x) == 8 for x in own.online)
    assert float(loss) != float(without)
    loss.backward()


def test_relic_is_the_loss_of_the_paper_for_two_views():
    method = method_of("relic", learn_temperature=False, temperature=(0.5,), predictor=False)
    own, (loss, per_prefix) = one_loss(method, views_of())
    total = 0.0
    for g, columns in enumerate(method.columns):
        online = torch.stack([x[:, columns] for x in own.online])
        target = torch.stack([x[:, columns] for x in own.target])
        value = losses.relic(online, target, temperature=0.5)
        assert float(per_prefix[g]) == pytest.approx(float(value), rel=1e-5)
        total += float(value)
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_moco_has_one_queue_of_whole_keys():
    method = method_of("moco", projector="none")
    assert method.queue is not None
    assert method.queue.keys.shape == (24, 32)
    own, (_, before) = one_loss(method, views_of())
    # A prefix's loss is that of the cut and normalised keys.
    for g, d in enumerate(DIMS):
        value = losses.info_nce(
            own.online[0][:, :d],
            own.target[0][:, :d],
            method.queue.keys[:, :d],
            temperature=0.2,
            in_batch=False,
        )
        assert float(before[g]) == pytest.approx(float(value), rel=1e-5)
    method.after_step(own, 0.9)
    assert torch.equal(method.queue.keys[:8], own.target[0])


@given(st.integers(1, 9), st.lists(st.integers(1, 9), max_size=6))
def test_the_queue_is_a_ring(size, pushes):
    queue = KeyQueue(size, 2)
    expected = [row.tolist() for row in queue.keys]
    position, number = 0, 0
    for wanted in pushes:
        count = min(wanted, size)
        keys = torch.arange(number, number + count).float()[:, None].expand(count, 2)
        queue.push(keys)
        for k in range(count):
            expected[(position + k) % size] = keys[k].tolist()
        position, number = (position + count) % size, number + count
    assert queue.keys.tolist() == expected
    assert int(queue.position) == position
    again = KeyQueue(size, 2)
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.keys, queue.keys)


def test_the_target_follows_and_starts_as_a_copy():
    method = method_of("byol")
    assert method.target is not None
    online = dict(method.online.named_parameters())
    for name, weight in method.target.tower.named_parameters():
        assert torch.equal(weight, online[name])
    before = copy.deepcopy(dict(method.target.tower.named_parameters()))
    with torch.no_grad():
        for weight in online.values():
            weight.add_(1)
    method.target.follow(method.online, 0.75)
    for name, weight in method.target.tower.named_parameters():
        assert torch.allclose(weight, 0.75 * before[name] + 0.25 * online[name], atol=1e-6), name


def test_the_momentum_of_the_repository_relic():
    # gamma = 1 - (1 - gamma0) (cos(pi k / K) + 1) / 2, k counted from the first update
    steps = 100
    for step in range(2, steps):
        k, total = step - 2, steps - 2
        wanted = 1 - (1 - 0.995) * (math.cos(math.pi * k / total) + 1) / 2
        assert momentum_at(step, steps, start=0.995, after=2) == pytest.approx(wanted)
    assert momentum_at(0, steps, start=0.995, after=2) == 0
    assert momentum_at(3, steps, start=0.995, after=2, every=2) == 1
    assert momentum_at(5, 100, start=0.999, end=0.999) == pytest.approx(0.999)


@given(st.floats(0.11, 5), st.floats(0.01, 0.1))
def test_a_learned_temperature_has_a_gradient_everywhere(initial, least):
    temperature = LearnedTemperature(initial, least)
    assert float(temperature().detach()) == pytest.approx(initial, rel=1e-4)
    (gradient,) = torch.autograd.grad(temperature(), temperature.raw)
    assert float(gradient) != 0
    with torch.no_grad():
        temperature.raw.fill_(50.0)
    assert float(temperature()) >= least * (1 - 1e-6)


@given(st.integers(0, 2**20))
def test_a_sliced_projector_is_that_of_the_repository_relic(seed):
    torch.manual_seed(seed)
    projector = SlicedProjector(DIMS, SslConfig(projector="mrl-e", out=5))
    x = torch.randn(3, 32)
    output = projector(x)
    for g, d in enumerate(DIMS):
        # all hidden units, of which the second layer sees the first d
        hidden = torch.relu(x[:, :d] @ projector.first.weight[:, :d].T)
        wanted = hidden[:, :d] @ projector.second.weight[:, :d].T
        assert torch.allclose(output[:, projector.columns[g]], wanted, atol=1e-5)


def test_the_plain_method_is_one_prefix():
    spec = ModelSpec("fast_cnn", 10, (32,), arch_options={"dim": 32})
    method = make_method(build(spec), SslConfig(method="relic"))
    _, (loss, per_prefix) = one_loss(method, views_of())
    assert per_prefix.shape == (1,)
    assert float(loss) == pytest.approx(float(per_prefix[0]))


def test_the_loss_of_moco_matryoshka():
    torch.manual_seed(0)
    criterion = MRL.MoCoMatryoshkaLoss([2, 4], temperature=0.5, queue_size=6)
    queue = criterion.queue.keys.clone()
    q = torch.randn(3, 4, requires_grad=True)
    k = torch.randn(3, 4)
    total, parts = criterion(q, k)
    wanted = []
    for d in (2, 4):
        unit = [torch.nn.functional.normalize(x[:, :d], dim=1) for x in (q, k, queue)]
        value = 0.0
        for i in range(3):
            scores = [float((unit[0][i] @ unit[1][i]).detach())]
            scores += (unit[2] @ unit[0][i]).detach().tolist()
            scores = [s / 0.5 for s in scores]
            value += (math.log(sum(math.exp(s) for s in scores)) - scores[0]) / 3
        wanted.append(value)
    assert parts == pytest.approx(wanted, rel=1e-5)
    assert float(total.detach()) == pytest.approx(sum(wanted), rel=1e-5)
    total.backward()
    assert q.grad is not None
    assert torch.equal(criterion.queue.keys[:3], k)


def test_the_encoders_of_moco_matryoshka():
    query, key = MRL.create_moco_matryoshka_resnet50([8, 16])
    assert query.get_submodule("fc").weight.shape == (16, 2048)
    assert all(not p.requires_grad for p in key.parameters())
    for name, weight in key.state_dict().items():
        assert torch.equal(weight, query.state_dict()[name])
