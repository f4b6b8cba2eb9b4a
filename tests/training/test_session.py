"""Runs that are stopped, killed, poisoned or hung, and how they resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matryoshka.train import train_imagenet

from matryoshka import config
from matryoshka.checkpoint.model_file import load_model
from matryoshka.distributed import World
from matryoshka.models import NestedModel
from matryoshka.nested import nested_cross_entropy
from matryoshka.training import session, snapshot
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.optim import make_optimizer, parameter_groups
from matryoshka.training.watch import REQUEUE, AnyRankFlags, HangWatch

ROOT = Path(__file__).resolve().parents[2]
CPU = World(torch.device("cpu"))


def options(digits, folder, run_id, *more):
    return [
        f"--data.train_dataset={digits['train']}",
        f"--data.val_dataset={digits['val']}",
        f"--logging.folder={folder}",
        f"--logging.run_id={run_id}",
        "--model.arch=resnet10",
        "--model.mrl=1",
        "--model.dims=8,64",
        "--training.epochs=2",
        "--training.batch_size=100",
        "--resolution.min_res=32",
        "--resolution.max_res=32",
        "--validation.resolution=32",
        "--validation.lr_tta=0",
        "--data.num_workers=1",
        *more,
    ]


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def losses(run):
    return [json.loads(line)["train_loss"] for line in (run / "log").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def _without_chart():
    """The chart takes a quarter of a short run; test_programs.py looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_imagenet, "draw_chart", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("alone")
    assert train_imagenet.main(options(digits, folder, "run")) == 0
    return folder / "run"


def test_a_training_checkpoint_is_a_model(alone):
    """The door to inference is open for a run that is not finished, too."""
    model, final = (
        load_model(alone / "checkpoints" / "last.safetensors"),
        load_model(alone / "model.safetensors"),
    )
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), final(x))
    assert (model.classes, model.preprocessing) == (final.classes, final.preprocessing)


# ---------------------------------------------------------------- stop and resume


def test_signals_leave_a_checkpoint_and_the_run_resumes(
    digits, tmp_path, alone, monkeypatch, capsys
):
    """SIGTERM inside an epoch, SIGUSR1 in an evaluation: status 75, then the same weights as if
    nothing had been.
    """
    original, steps = NonFiniteGuard.before_step, []

    def at_step(self):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(NonFiniteGuard, "before_step", at_step)
    assert train_imagenet.main(options(digits, tmp_path, "run")) == REQUEUE
    monkeypatch.setattr(NonFiniteGuard, "before_step", original)
    forward = NestedModel.forward

    def with_signal(self, images):
        if not self.training:
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(self, images)

    monkeypatch.setattr(NestedModel, "forward", with_signal)
    again = options(digits, tmp_path, "run", "--training.resume=auto")
    assert train_imagenet.main(again) == REQUEUE
    monkeypatch.setattr(NestedModel, "forward", forward)
    assert train_imagenet.main(again) == 0
    out = capsys.readouterr().out
    assert "resume   after step 3, epoch 0" in out
    assert "resume   after step 4, epoch 0" in out  # trained, not evaluated
    run = tmp_path / "run"
    assert [e["event"] for e in events(run)] == ["start", "stopped", "go on", "stopped", "go on"]
    assert losses(run) == losses(alone)
    ours, theirs = (
        snapshot.read(r / "checkpoints" / "last.safetensors").tensors for r in (run, alone)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert train_imagenet.main(again) == 0  # it is finished
    assert "this run is done" in capsys.readouterr().out
    assert losses(run) == losses(alone)


def test_a_run_with_adan_resumes_exactly(digits, tmp_path, monkeypatch):
    small = ["--resolution.min_res=16", "--resolution.max_res=16", "--validation.resolution=16"]
    more = ["--training.epochs=1", "--training.optimizer=adan", *small]
    assert train_imagenet.main(options(digits, tmp_path, "undisturbed", *more)) == 0
    original, steps = NonFiniteGuard.before_step, []

    def at_step(self):
        steps.append(0)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(NonFiniteGuard, "before_step", at_step)
    assert train_imagenet.main(options(digits, tmp_path, "run", *more)) == REQUEUE
    again = options(digits, tmp_path, "run", "--training.resume=auto", *more)
    assert train_imagenet.main(again) == 0
    assert len(steps) == 4
    ours, theirs = (
        snapshot.read(tmp_path / run / "checkpoints" / "last.safetensors")
        for run in ("run", "undisturbed")
    )
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


def test_refusals_of_resume(digits, tmp_path, alone, capsys):
    def line(*more, run="run", folder=alone.parent):
        with pytest.raises(SystemExit) as stop:
            train_imagenet.main(options(digits, folder, run, *more))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    assert "--training.resume=auto" in line()
    refused = line("--training.resume=auto", "--lr.lr=0.5", "--training.label_smoothing=0")
    assert "lr.lr was None and is 0.5" in refused
    assert "training.label_smoothing was 0.1 and is 0" in refused
    assert "no such run folder" in line(f"--training.resume={tmp_path / 'x'}", run="other")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "log").write_text("")
    assert "no valid checkpoint" in line(f"--training.resume={tmp_path / 'bare'}", run="other")
    assert "needs logging.run_id" in line("--training.resume=auto", run="")


def test_auto_starts_a_run_without_checkpoint(digits, tmp_path, alone):
    """No folder, an empty one, one that was killed before its first checkpoint."""
    for name, files in (
        ("none", None),
        ("empty", []),
        ("killed", ["params.json", "env.json", "log"]),
    ):
        if files is not None:
            (tmp_path / name).mkdir()
        for file in files or []:
            (tmp_path / name / file).write_text('{"epoch": 7}\n')
        if name == "killed":  # whole runs take seconds: the others show only how they begin
            assert (
                train_imagenet.main(options(digits, tmp_path, name, "--training.resume=auto")) == 0
            )
            assert losses(tmp_path / name) == losses(alone)
        else:
            point = session.resolve_run(tmp_path, name, "auto", {})
            assert point == session.ResumePoint(tmp_path / name)


def test_a_checkpoint_can_be_chosen(digits, tmp_path, alone, capsys):
    """training.resume=<file>: later checkpoints and log lines are dropped; batch size and folder
    may change.
    """
    shutil.copytree(alone, tmp_path / "copy")
    steps = sorted(
        (tmp_path / "copy" / "checkpoints").glob("step_*"), key=lambda p: int(p.stem[5:])
    )
    more = [
        f"--training.resume={steps[-2]}",
        "--training.batch_size=50",
        "--training.global_batch_size=100",
    ]
    assert train_imagenet.main(options(digits, tmp_path / "elsewhere", "other", *more)) == 0
    assert "resume   after step 4, epoch 1" in capsys.readouterr().out
    assert len(losses(tmp_path / "copy")) == 2, "one line per epoch"
    assert losses(tmp_path / "copy")[0] == losses(alone)[0]


def test_checkpoints_by_the_clock(digits, tmp_path):
    """Every 6 ms, which every step takes longer than: one after each; without it those of start and
    epoch alone.
    """
    for minutes, steps in ((0.0001, [0, 1, 2, 3, 4]), (0, [0, 4])):
        run = tmp_path / f"every{minutes}"
        more = [
            f"--training.checkpoint_every_minutes={minutes}",
            "--training.keep_last=9",
            "--training.epochs=1",
        ]
        assert train_imagenet.main(options(digits, tmp_path, run.name, *more)) == 0
        found = sorted(
            int(path.stem.removeprefix("step_")) for path in run.glob("checkpoints/step_*")
        )
        assert found == steps


# ---------------------------------------------------------------- poison


def poisoned(kind, monkeypatch, when):
    """Damage some steps: the loss, a gradient, the input or running statistics.

    Returns the loss to train with.
    """
    calls = [0]
    before_step, forward = NonFiniteGuard.before_step, NestedModel.forward

    def loss(*args, **kwargs):
        total, each = nested_cross_entropy(*args, **kwargs)
        return (total * float("nan"), each) if kind == "loss" and when(calls[0]) else (total, each)

    def with_input(self, images):
        if kind == "input" and self.training and when(calls[0]):
            images = images * float("inf")
        return forward(self, images)

    def step(self):
        calls[0] += 1
        if kind == "gradient" and when(calls[0] - 1):
            self._parameters[3].grad.select(0, 0).fill_(float("inf"))
        if kind == "statistics" and when(calls[0] - 1):
            self._buffers[0].fill_(float("nan"))
        return before_step(self)

    monkeypatch.setattr(NestedModel, "forward", with_input)
    monkeypatch.setattr(NonFiniteGuard, "before_step", step)
    return loss


def train(argv, loss):
    """The program with another loss."""
    train_imagenet.train(config.read(train_imagenet.SECTIONS, argv), CPU, loss=loss)


@pytest.mark.parametrize("kind", ["loss", "gradient", "input", "statistics"])
def test_steps_that_are_not_finite(digits, tmp_path, monkeypatch, kind):
    """5 of 8 steps poisoned, of each of four kinds (20 in all): they are skipped and reported;
    the run ends healthy.
    """
    loss = poisoned(kind, monkeypatch, lambda step: step in (0, 2, 3, 5, 6))
    train(options(digits, tmp_path, "run", "--training.batch_size=100"), loss)
    run = tmp_path / "run"
    model = load_model(run / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    skipped = [e["step"] for e in events(run) if e["event"] == "skipped"]
    assert skipped == ([] if kind == "statistics" else [0, 2, 3, 5, 6])
    assert all(np.isfinite(loss) and loss > 0 for loss in losses(run)), losses(run)


def test_a_streak_of_skips_rolls_back_with_a_lower_rate(digits, tmp_path, monkeypatch, capsys):
    loss = poisoned("loss", monkeypatch, lambda step: 4 <= step < 7)
    more = [
        "--training.skip_limit=3",
        "--training.checkpoint_every_steps=3",
        "--logging.log_level=2",
    ]
    train(options(digits, tmp_path, "run", *more), loss)
    out, run = capsys.readouterr().out, tmp_path / "run"
    back = next(e for e in events(run) if e["event"] == "rolled back")
    assert (back["step"], back["to"]) == (6, 4)
    assert "back to step 4, learning rate x 0.1" in out
    rates = {
        int(line.split()[1]): float(line.split()[5])
        for line in out.splitlines()
        if line.startswith("step ")
    }
    assert rates[7] < 0.2 * rates[3], f"rates by step: {rates}"
    assert len(losses(run)) == 2, "one line per epoch"
    assert (
        snapshot.read(run / "checkpoints" / "last.safetensors").metadata["progress"]["rollbacks"]
        == 1
    )


def test_a_run_that_stays_non_finite_ends(digits, tmp_path, monkeypatch):
    loss = poisoned("loss", monkeypatch, lambda step: True)
    with pytest.raises(session.Diverged, match="still non-finite after 5 rollbacks; lower lr") as e:
        train(options(digits, tmp_path, "run", "--training.skip_limit=2"), loss)
    assert e.value.user_error  # config.program prints it as one line, with status 2
    assert snapshot.newest(tmp_path / "run" / "checkpoints")[0].metadata["step"] == 0


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adan"])
def test_a_skipped_step_changes_nothing(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    optimizer = make_optimizer(
        name, parameter_groups(model, 0.1, 0.0), 0.1, 0.9, torch.device("cpu")
    )
    guard, skips = NonFiniteGuard(model, torch.device("cpu"), clip=0.5), []
    for bad in (False, True, True, False):
        before = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3) * (float("nan") if bad else 1)).square().sum()
        loss.backward()
        norm, skip = guard.before_step()
        if not bad:  # clipped: the norm as it was is reported
            clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            assert clipped <= 0.5 + 1e-5, f"norm after clipping to 0.5: {clipped}"
        guard.step(optimizer, skip)
        skips += [
            report.consecutive_skips for report in guard.after_step(0, loss.detach(), norm, skip)
        ]
        after = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
        assert all(torch.equal(before[k], after[k]) for k in after) == bad
    assert skips == [0, 1, 2, 0]


# ---------------------------------------------------------------- hangs, flags, kills


HANG = """
import os, socket, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from matryoshka.training.watch import HangWatch

def waits_for_nothing():
    time.sleep(60)

def work(rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    with HangWatch(Path(sys.argv[1]), rank, 2.0) as watch:
        for step in range(4):
            time.sleep(0.8)
            watch.beat()
        if rank == 1:
            waits_for_nothing()
        dist.all_reduce(torch.zeros(1))

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
children = []
for rank in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        work(rank)
        os._exit(0)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_a_hang_leaves_the_stacks_of_all_ranks_and_ends(tmp_path):
    """Rank 1 hangs, rank 0 waits for it in an all-reduce: both end with status 1 and say where they
    were.
    """
    start = time.monotonic()
    command = [sys.executable, "-c", HANG, str(tmp_path / "stacks")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "[1, 1]\n", done.stderr
    assert time.monotonic() - start < 58, "it was not the watch that ended them"
    assert "waits_for_nothing" in (tmp_path / "stacks" / "rank_1.txt").read_text()
    assert "all_reduce" in (tmp_path / "stacks" / "rank_0.txt").read_text()
    with HangWatch(tmp_path / "none", 0, 100.0) as watch:
        watch.beat()
    assert not (tmp_path / "none").exists()


def test_flags_of_one_process_count_at_once():
    flags = AnyRankFlags(2, CPU)
    assert flags.exchange(True, False) == [True, False]
    assert flags.finish() == [False, False]


@pytest.mark.slow
def test_runs_that_are_killed_end_like_one_that_is_not():
    """A short chaos.py; `make chaos KILLS=200` is the long one."""
    kills = 2 * (int(os.environ.get("CHAOS_KILLS", "6")) // 2)  # half with two processes
    command = [
        sys.executable,
        str(ROOT / "tests" / "training" / "chaos.py"),
        f"--kills={kills}",
        "--per-run=3",
        "--seed=2",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{kills} kills (" in done.stdout
    assert "runs that differ: 0" in done.stdout


def test_a_checkpoint_of_another_shape_is_one_line(digits, tmp_path, alone, monkeypatch, capsys):
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()  # as if it were not finished
    monkeypatch.setattr(session, "check_options", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        train_imagenet.main(
            options(digits, tmp_path, "run", "--training.resume=auto", "--model.dims=8,32")
        )
    assert stop.value.code == 2
    assert "does not fit this run" in capsys.readouterr().err
