"""Several processes: the same batches, gradients and metrics as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import run_script
from matryoshka.inference import pytorch_inference
from matryoshka.train import train_cifar10, train_imagenet
from torchrun_starts import ROOT, free_ports, torchrun

from matryoshka import devices, distributed
from matryoshka.checkpoint import load_model
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.data.augment import normalise
from matryoshka.distributed import DistConfig, DistributedError

# One step of the training loop's own function in float64, batch norm in eval mode, by forks of one
# process.
STEPS = """
import functools, sys
import torch
from types import SimpleNamespace
from forked_ranks import as_ranks
from matryoshka import devices, distributed
from matryoshka.data import Loader, RandomResizedCrop, augment
from matryoshka.training.compiling import Forward
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.options import DataConfig
from matryoshka.evaluation.accuracy import PrefixAccuracy
from matryoshka.models import ModelSpec, build
from matryoshka.nested import nested_cross_entropy
from matryoshka.evaluation.predict import predict
from matryoshka.training import supervised_step as program
from matryoshka.training.run import distribute
from matryoshka.training.state import TrainState
from matryoshka.training.sums import Sums

beton, val, out = sys.argv[1:4]
batch = int(sys.argv[4])
micro = int(sys.argv[5])
torch.set_num_threads(1)
in_float32 = augment.normalise
augment.normalise = lambda images, *scale: in_float32(images, *scale, dtype=torch.float64)
program.normalise = augment.normalise
program.nested_cross_entropy = None  # the step must use the loss that it is given

class NoFloat(torch.nn.Module):  # keeps the logits in float64
    def __init__(self, inner):
        super().__init__()
        self.inner, self.preprocessing = inner, inner.preprocessing
    def forward(self, x):
        return SimpleNamespace(float=functools.partial(lambda logits: logits, self.inner(x)))

def work():
    with distributed.joined("cpu") as world:
        torch.manual_seed(0)
        model = build(ModelSpec("resnet10", 10, (8, 32, 512))).double()
        weights = torch.tensor([2.0, 1.0, 1.0]).double()
        loss_fn = functools.partial(nested_cross_entropy, label_smoothing=0.1)
        objective = program.Objective(
            NoFloat(model), loss_fn, weights=weights, precision="fp32"
        )
        ddp = distribute(objective, world).eval()
        ranks = dict(rank=world.rank, world=world.size, num_workers=1)
        loader = Loader(beton, batch, crop=RandomResizedCrop(32), drop_last=True, seed=7, **ranks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        sums = Sums({"loss": (), "prefix_loss": (3,)}, world.device, torch.float64)
        state = TrainState(
            model=model, optimizer=optimizer, loader=loader, scaler=scaler, sums=sums, metadata={}
        )
        cfg = SimpleNamespace(
            data=DataConfig(),
            training=SimpleNamespace(seed=1, batch_size=micro, sandwich=None),
        )
        order = []
        for k, b in enumerate(loader):
            order.append(b.index.tolist())
            if k == 0:
                program.train_step(
                    b, 0.0, cfg=cfg, world=world, forward=Forward(ddp), state=state,
                    guard=NonFiniteGuard(model, world.device),
                )
        metric = PrefixAccuracy(model.dims)
        evaluation = Loader(val, 30, order="sequential", **ranks)
        evaluation.crop = RandomResizedCrop(32)
        for p in predict(model.float(), evaluation):
            metric.update(p.logits, p.labels)
        gradient = None
        if world.is_main:
            gradient = torch.cat([p.grad.flatten() for p in model.double().parameters()])
        totals = distributed.sum_over_ranks(state.sums.totals, world)
        found = {"order": order, "accuracy": metric.compute()}
        found |= {"gradient": gradient, "totals": totals}
        torch.save(found, f"{out}.{world.size}.{world.rank}")

for size, port in zip(map(int, sys.argv[6].split(",")), map(int, sys.argv[7].split(","))):
    assert as_ranks(work, size, port) == [0] * size
"""


@pytest.mark.parametrize(
    ("batch", "micro", "worlds"),
    [(32, 64, (1, 2)), pytest.param(33, 5, (1, 2, 3, 4, 7), marks=pytest.mark.slow)],
)
def test_processes_see_one_order_and_compute_one_gradient(tmp_path, digits, batch, micro, worlds):
    """2, 3, 4 and 7 gloo processes against 1, same global batch, also where it does not divide, and
    cut into parts.
    """
    ports = ",".join(map(str, free_ports(len(worlds))))
    arguments = [
        digits["train"],
        digits["val"],
        tmp_path / "out",
        batch,
        micro,
        ",".join(map(str, worlds)),
        ports,
    ]
    run_script(STEPS, *arguments)
    results = {
        w: [torch.load(f"{tmp_path}/out.{w}.{r}", weights_only=False) for r in range(w)]
        for w in worlds
    }
    alone = results[1][0]
    assert len(alone["order"]) == 400 // batch, "full global batches of an epoch"
    assert alone["gradient"].abs().max() > 1e-3, "a vanishing gradient proves nothing"
    assert alone["totals"][-1] == batch, "images of the one step"
    for world, ranks in results.items():
        joined = [[i for r in ranks for i in r["order"][k]] for k in range(len(alone["order"]))]
        assert joined == alone["order"]
        difference = (alone["gradient"] - ranks[0]["gradient"]).abs().max().item()
        assert difference <= 1e-10, f"{world} ranks: gradients differ by {difference}"
        totals = ranks[0]["totals"]
        assert torch.allclose(totals, alone["totals"], rtol=1e-12), f"{world} ranks: {totals}"
        assert all(r["accuracy"] == alone["accuracy"] for r in ranks)


def train_options(digits, folder, run_id, *more):
    return [
        f"--data.train_dataset={digits['train']}",
        f"--data.val_dataset={digits['val']}",
        f"--logging.folder={folder}",
        f"--logging.run_id={run_id}",
        "--model.arch=resnet10",
        "--model.mrl=1",
        "--training.epochs=1",
        "--resolution.min_res=32",
        "--resolution.max_res=32",
        "--validation.resolution=32",
        "--data.num_workers=1",
        *more,
    ]


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_three_ways_to_two_processes_end_with_the_same_weights(tmp_path, digits):
    """torchrun; the program's own launch; two torchrun agents with a c10d rendezvous, as on two
    machines, of which one loses its worker to SIGKILL and resumes.
    """
    script = ROOT / "train" / "train_imagenet.py"
    options = [
        "--training.batch_size=50",
        "--training.epochs=3",
        "--training.checkpoint_every_steps=1",
    ]
    options += ["--training.device=cpu"]
    torchrun(2, script, *train_options(digits, tmp_path, "torchrun", *options))

    command = [sys.executable, script, *train_options(digits, tmp_path, "own", *options)]
    command += ["--training.distributed=1", "--dist.world_size=2"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in done.stdout
    results = tmp_path / "results.json"
    model = tmp_path / "own" / "model.safetensors"
    pytorch_inference.main(
        [f"--path={model}", f"--data-root={digits['val']}", "--tta", f"--output={results}"]
    )
    alone = json.loads(results.read_text())["prefixes"]  # one process, the saved weights
    for d, accuracy in alone.items():
        assert log_of(tmp_path / "own")[-1][f"top_1_{d}"] == pytest.approx(
            accuracy["top1"] / 100, abs=1e-9
        ), f"top-1 of prefix {d}: the log against the saved model"

    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1"
    }
    rendezvous = [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}",
        "--rdzv-id=killed",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=3",
    ]
    command += [*rendezvous, script, *train_options(digits, tmp_path, "killed", *options)]
    run = tmp_path / "killed"
    files = [open(tmp_path / f"agent{k}.txt", "w") for k in range(2)]  # noqa: SIM115
    agents = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
        for f in files
    ]
    try:
        deadline = time.monotonic() + 200
        while not list(run.glob("checkpoints/step_[3-9]*")):
            assert time.monotonic() < deadline, "no third checkpoint within 200 s"
            assert [agent.poll() for agent in agents] == [None, None], (
                tmp_path / "agent0.txt"
            ).read_text()[-3000:]
            time.sleep(0.05)
        os.kill(children(agents[1].pid)[-1], signal.SIGKILL)
        assert [agent.wait(timeout=250) for agent in agents] == [0, 0], (
            tmp_path / "agent0.txt"
        ).read_text()[-3000:]
    finally:
        for agent, file in zip(agents, files, strict=True):
            agent.kill()
            file.close()
    kinds = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds[:2] == ["start", "go on"]

    first = torch.load(tmp_path / "torchrun" / "final_weights.pt", weights_only=True)
    for name in ("own", "killed"):
        losses = [
            [line["train_loss"] for line in log_of(tmp_path / run_id)]
            for run_id in ("torchrun", name)
        ]
        assert losses[0] == losses[1], name
        weights = torch.load(tmp_path / name / "final_weights.pt", weights_only=True)
        assert all(
            torch.equal(a, b) for a, b in zip(first.values(), weights.values(), strict=True)
        ), name


def test_another_number_of_processes_resumes_with_the_same_batches(tmp_path, digits, capsys):
    """One process, then two of smaller batches: the global batch stays, the finished epoch is not
    trained again.
    """
    options = [
        "--training.epochs=2",
        "--training.global_batch_size=100",
        "--training.batch_size=100",
    ]
    train_imagenet.main([*train_options(digits, tmp_path, "run"), *options])
    alone, options = log_of(tmp_path / "run"), ["--training.epochs=2", "--training.batch_size=30"]
    resume = f"--training.resume={tmp_path / 'run' / 'checkpoints' / 'step_4.safetensors'}"
    out = torchrun(
        2,
        ROOT / "train" / "train_imagenet.py",
        *train_options(digits, tmp_path, "run"),
        *options,
        resume,
    )
    assert "2 x cpu" in out
    assert "2 epochs x 4 steps of 100 images" in out
    assert "resume   after step 4, epoch 1" in out
    together = log_of(tmp_path / "run")
    assert [line["epoch"] for line in together] == [0, 1]
    assert together[0]["train_loss"] == alone[0]["train_loss"]
    assert together[1]["train_loss"] == pytest.approx(alone[1]["train_loss"], rel=0.2), (
        "batch norm sees parts of the batch, more must not change"
    )


def log_of(run):
    return [json.loads(line) for line in (run / "log").read_text().splitlines()]


def test_a_users_mistake_in_a_launched_run_is_one_line(tmp_path, digits):
    command = [sys.executable, ROOT / "train" / "train_imagenet.py"]
    command += train_options(
        digits,
        tmp_path,
        "x",
        "--training.batch_size=0",
        "--training.distributed=1",
        "--dist.world_size=2",
    )
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1, done.stderr
    assert "training.batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_dp_of_the_cifar_program_is_two_processes(tmp_path, digits, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--dp", "--dist.world_size=2", "--device=cpu", "--net=resnet10"]
    words += ["--size=16", "--n_epochs=1", "--bs=90", "--nowandb"]
    words += ["--notb", "--noaug", f"--data={digits['train']},{digits['val']}"]
    status = train_cifar10.main([*words, "--data.num_workers=1"])
    out, err = capfd.readouterr()
    assert status == 0, err[-3000:]
    assert "device   2 x cpu" in out
    assert "4 steps of 90 images" in out, "--bs counts the images of both"
    for line in ("validation top-1 512:", "test     top-1 512:", "model    runs/"):
        assert out.count(line) == 1, "the first process alone speaks"
    (run,) = tmp_path.glob("runs/resnet10_lr0.0001_cifar10/*")
    results = json.loads((run / "results.json").read_text())
    model = load_model(tmp_path / "checkpoint/resnet10-cifar10-4-ckpt.t7")
    loader = Loader(open_dataset(digits["val"]), 100, order="sequential", crop=CenterCrop(16, 1.0))
    (batch,) = loader
    mean, std = model.preprocessing.mean, model.preprocessing.std
    with torch.no_grad():
        right = model(normalise(batch.images, mean, std))[0].argmax(1) == batch.labels
    assert results["test"]["top_1"]["512"] == pytest.approx(100 * float(right.float().mean()))


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
    assert devices.pick_precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(devices.DeviceError, match="fp16"):
        devices.pick_precision("fp16", torch.device("cpu"))


def test_bf16_on_a_cpu_computes_in_bf16():
    layer = torch.nn.Linear(4, 4)
    with devices.autocast(torch.device("cpu"), "bf16"):
        assert layer(torch.zeros(1, 4)).dtype == torch.bfloat16
    with devices.autocast(torch.device("cpu"), "fp32"):
        assert layer(torch.zeros(1, 4)).dtype == torch.float32
    assert np.isfinite(layer(torch.zeros(1, 4)).detach().numpy()).all()
