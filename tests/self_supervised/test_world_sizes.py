"""The world size does not change a method: 1 process and 2 with half of the batch each."""

import json

import pytest
import torch
from forked_ranks import run_script
from torchrun_starts import free_ports

from matryoshka.ssl import METHODS

# Options of a method, and its number of small views.
CASES = {name: ({"method": name}, 0) for name in METHODS} | {
    "moco, evaluates the target": ({"method": "moco", "encoder": "target"}, 0),
    "moco, symmetric": ({"method": "moco", "symmetric": True}, 0),
    "moco, version 3": ({"method": "moco", "version": 3}, 0),
    "moco, small views": ({"method": "moco"}, 2),
    "relic, one sliced projector": ({"method": "relic", "projector": "mrl-e"}, 0),
    "relic, learned temperature": ({"method": "relic", "learn_temperature": True}, 0),
    "relic, small views": ({"method": "relic"}, 2),
    "byol, small views": ({"method": "byol"}, 2),
    "sigreg, small views": ({"method": "sigreg"}, 2),
}

# The program's own step in float64, batch norm in eval mode, by forks of one process.
STEPS = """
import json, sys
import torch
from types import SimpleNamespace
from forked_ranks import as_ranks
from matryoshka import distributed
from matryoshka.data import augment
from matryoshka.data.augment import Preprocessing
from matryoshka.data.loader import Batch
from matryoshka.data.views import ViewOptions
from matryoshka.evaluation.online_probe import OnlineProbe
from matryoshka.models import ModelSpec, build
from matryoshka.ssl import SslConfig, make_method
from matryoshka.training import ssl_step
from matryoshka.training.compiling import Forward
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.run import distribute
from matryoshka.training.state import TrainState
from matryoshka.training.sums import Sums

out, cases = sys.argv[1], json.loads(sys.argv[4])
torch.set_num_threads(1)
in_float32 = augment.normalise
ssl_step.normalise = lambda images, *scale: in_float32(images, *scale, dtype=torch.float64)
BATCH, DIMS = 8, (4, 8)

def step(options, small, world):
    torch.manual_seed(0)
    encoder = build(ModelSpec("fast_cnn", 3, DIMS, arch_options={"dim": 8}))
    config = SslConfig(**options, hidden=8, out=4, queue=16, directions=8)
    learner = ssl_step.Learner(make_method(encoder, config), OnlineProbe(DIMS, 3)).double()
    learner.probe.float()
    passes = ssl_step.Passes(learner.method, Preprocessing(), "fp32")
    ddp = distribute(passes, world)
    learner.eval()
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.randint(256, (BATCH, side, side, 3), generator=generator, dtype=torch.uint8)
        for side in [32] * 2 + [16] * small
    ]
    labels = torch.randint(3, (BATCH,), generator=generator)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    batch = Batch([view[own] for view in images], labels[own], torch.arange(BATCH)[own])
    trained = [p for p in learner.method.parameters() if p.requires_grad]
    state = TrainState(
        model=learner, optimizer=torch.optim.SGD(trained, lr=0.0),
        loader=SimpleNamespace(batch_size=BATCH),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        sums=Sums({"loss": (), "prefix_loss": (2,), "right": (2,)}, world.device, torch.float64),
        metadata={},
    )
    cfg = SimpleNamespace(
        ssl=config, views=SimpleNamespace(count=2),
        training=SimpleNamespace(seed=3, batch_size=BATCH),
    )
    ssl_step.train_step(
        batch, 0.0, cfg=cfg, world=world, forward=Forward(ddp), state=state,
        guard=NonFiniteGuard(learner, world.device),
        views=ssl_step.ViewMaker([ViewOptions(flip=0)] * len(images), Preprocessing(), 0),
        momentum=0.5,
    )
    totals = distributed.sum_over_ranks(state.sums.totals, world)
    return {
        "gradient": torch.cat([p.grad.flatten() for p in trained]),
        "loss": totals[:3] / totals[-1],
        "state": torch.cat([
            v.double().flatten() for n, v in learner.state_dict().items() if "num_batches" not in n
        ]),
    }

def work():
    with distributed.joined("cpu") as world:
        found = {name: step(*case, world) for name, case in cases.items()}
        if world.is_main:
            torch.save(found, f"{out}.{world.size}")

for size, port in zip((1, 2), map(int, sys.argv[2:4])):
    assert as_ranks(work, size, port) == [0] * size
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("worlds") / "step"
    run_script(STEPS, out, *free_ports(2), json.dumps(CASES))
    return [torch.load(f"{out}.{size}", weights_only=True) for size in (1, 2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_step_of_one(steps, name):
    one, two = (found[name] for found in steps)
    assert one["gradient"].abs().max() > 1e-3
    assert torch.allclose(one["loss"], two["loss"], rtol=0, atol=1e-10)
    assert torch.allclose(one["gradient"], two["gradient"], rtol=0, atol=1e-10)
    # Targets, queues and the probe, whose features are float32.
    assert torch.allclose(one["state"], two["state"], rtol=0, atol=1e-6)
