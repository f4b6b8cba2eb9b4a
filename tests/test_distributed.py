"""Several processes: the same batches, gradients and metrics as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matryoshka.inference import pytorch_inference

from matryoshka import distributed
from matryoshka.distributed import DistConfig, DistributedError

ROOT = Path(__file__).resolve().parents[1]

# What every process does: one step of the training loop's own function in float64, batch norm in eval mode.
STEP = """
import functools, json, sys, torch
from matryoshka import distributed
from matryoshka.data import Loader, RandomResizedCrop
from matryoshka.data import augment
from matryoshka.metrics import PrefixAccuracy
from matryoshka.models import ModelSpec, build
from matryoshka.nested import nested_cross_entropy
from matryoshka.predict import predict
from matryoshka.train import train_imagenet as program

beton, out, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
program.normalise = lambda images: augment.normalise(images, dtype=torch.float64)
with distributed.joined("cpu") as world:
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", 10, (8, 32, 512))).double()
    ddp = program.distribute(model, world).eval()
    ranks = dict(rank=world.rank, world=world.size)
    loader = Loader(beton, batch, image=RandomResizedCrop(32), drop_last=True, seed=7, **ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    weights = torch.tensor([2.0, 1.0, 1.0]).double()
    loss_of = functools.partial(nested_cross_entropy, weights=weights, label_smoothing=0.1)
    program.nested_cross_entropy = None  # the step must use the loss that it is given
    class NoFloat(torch.nn.Module):  # keep the logits in float64
        def __init__(self, inner):
            super().__init__(); self.inner = inner
        def forward(self, x):
            return Double(self.inner(x))
    class Double:
        def __init__(self, logits): self.logits = logits
        def float(self): return self.logits
    order = []
    for k, b in enumerate(loader):
        order.append(b.index.tolist())
        if k == 0:
            program.train_step(NoFloat(ddp), b, optimizer, scaler, loss_of, "fp32", batch, world)
    metric = PrefixAccuracy(model.dims)
    evaluation = Loader(beton, 30, order="sequential", **ranks)
    evaluation.image = RandomResizedCrop(32)
    for p in predict(model.float(), evaluation):
        metric.update(p.logits, p.labels)
    accuracy = metric.compute()
    gradient = torch.cat([p.grad.flatten() for p in model.double().parameters()]) if world.is_main else None
    torch.save({"order": order, "accuracy": accuracy, "gradient": gradient}, f"{out}.{world.rank}")
"""


def torchrun(processes: int, *command, timeout=280):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1"
    }
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        *map(str, command),
    ]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("batch", [32, 33])
def test_processes_see_one_order_and_compute_one_gradient(tmp_path, digits, batch):
    """2 gloo processes against 1, same global batch, also where it does not divide: order, gradient, accuracy."""
    script = tmp_path / "step.py"
    script.write_text(STEP)
    results = {}
    for world in (1, 2):
        torchrun(world, script, digits["train"], tmp_path / f"world{world}", batch)
        results[world] = [torch.load(f"{tmp_path}/world{world}.{r}", weights_only=False) for r in range(world)]
    alone, ranks = results[1][0], results[2]
    joined = [[i for r in ranks for i in r["order"][k]] for k in range(len(alone["order"]))]
    assert joined == alone["order"]
    assert len(alone["order"]) == 400 // batch
    difference = (alone["gradient"] - ranks[0]["gradient"]).abs().max().item()
    assert difference <= 1e-10, difference
    assert alone["gradient"].abs().max() > 1e-3
    assert ranks[0]["accuracy"] == ranks[1]["accuracy"] == alone["accuracy"]


def train_options(digits, folder, run_id, *more):
    return [
        f"--data.train_dataset={digits['train']}", f"--data.val_dataset={digits['val']}",
        f"--logging.folder={folder}",
        f"--logging.run_id={run_id}", "--model.arch=resnet10", "--model.mrl=1", "--training.epochs=1",
        "--resolution.min_res=32", "--resolution.max_res=32", "--validation.resolution=32",
        "--data.num_workers=1", *more,
    ]  # fmt: skip


def test_both_ways_to_start_two_processes(tmp_path, digits):
    """torchrun, and dist.world_size=2 through the program's own launch, train the same model."""
    script = ROOT / "train" / "train_imagenet.py"
    options = ["--training.batch_size=50", "--training.device=cpu"]
    torchrun(2, script, *train_options(digits, tmp_path, "torchrun", *options))
    command = [sys.executable, script, *train_options(digits, tmp_path, "own", *options)]
    command += ["--training.distributed=1", "--dist.world_size=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in done.stdout
    logs = [json.loads((tmp_path / name / "log").read_text()) for name in ("torchrun", "own")]
    weights = [torch.load(tmp_path / name / "final_weights.pt", weights_only=True) for name in ("torchrun", "own")]
    assert logs[0]["train_loss"] == logs[1]["train_loss"]
    results = tmp_path / "results.json"
    model = tmp_path / "own" / "model.safetensors"
    pytorch_inference.main([f"--path={model}", f"--data-root={digits['val']}", "--tta", f"--output={results}"])
    alone = json.loads(results.read_text())["prefixes"]  # one process, the saved weights
    for d, accuracy in alone.items():
        assert logs[1][f"top_1_{d}"] == pytest.approx(accuracy["top1"] / 100, abs=1e-9), d
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_a_users_mistake_in_a_launched_run_is_one_line(tmp_path, digits):
    command = [sys.executable, ROOT / "train" / "train_imagenet.py"]
    command += train_options(
        digits, tmp_path, "x", "--training.batch_size=300", "--training.distributed=1", "--dist.world_size=2"
    )
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "training.batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- decisions


def test_how_many_processes(monkeypatch):
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    decide = distributed.processes_to_start
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert decide(DistConfig(), None, "auto") == 1
    assert decide(DistConfig(world_size=2), False, "auto") == 1
    assert decide(DistConfig(), True, "auto") == 4
    assert decide(DistConfig(world_size=2), True, "auto") == 2
    assert decide(DistConfig(), True, "cpu") == 1
    assert decide(DistConfig(world_size=9), True, "cpu") == 9
    with pytest.raises(DistributedError, match=r"dist.world_size=8: only 4 GPUs"):
        decide(DistConfig(world_size=8), True, "auto")
    with pytest.raises(DistributedError, match=r"dist.world_size=-1"):
        decide(DistConfig(world_size=-1), True, "cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert decide(DistConfig(world_size=9), True, "cpu") == 1  # torchrun's environment wins
    distributed.check(None, "cpu")
    with pytest.raises(DistributedError, match=r"training.distributed=0 under torchrun with 3"):
        distributed.check(False, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_where_none_is():
    with pytest.raises(DistributedError, match=r"device=cuda: 0 GPUs"):
        distributed.pick_device("cuda", 0)
    with pytest.raises(DistributedError, match=r"device=mps"):
        distributed.pick_device("mps", 0)
    assert distributed.pick_device("auto", 0).type == "cpu"
    assert distributed.pick_precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(DistributedError, match="fp16"):
        distributed.pick_precision("fp16", torch.device("cpu"))


def test_bf16_on_a_cpu_computes_in_bf16():
    layer = torch.nn.Linear(4, 4)
    with distributed.autocast(torch.device("cpu"), "bf16"):
        assert layer(torch.zeros(1, 4)).dtype == torch.bfloat16
    with distributed.autocast(torch.device("cpu"), "fp32"):
        assert layer(torch.zeros(1, 4)).dtype == torch.float32
    assert np.isfinite(layer(torch.zeros(1, 4)).detach().numpy()).all()
