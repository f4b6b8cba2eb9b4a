"""Logs of a run: JSON lines, TensorBoard, Weights & Biases."""

import json
import os
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from matryoshka.distributed import World
from matryoshka.training import session
from matryoshka.training.run_folder import (
    RunLog,
    WandbError,
    accuracy_metrics,
    epoch_scalars,
    log_line,
)
from matryoshka.training.state import LoopState


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def board(path):
    """{tag: [(step, value)]} as TensorBoard itself reads them."""
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


# ---------------------------------------------------------------- lines and TensorBoard


def test_tensorboard_reads_the_scalars(tmp_path):
    log = RunLog(tmp_path / "run", {"a": 1}, "a: 1\n")
    log.write_scalars({"loss": 2.5, "top_1/8": 62.5}, 10)
    log.write_scalars({"loss": 1.25, "top_1/8": 75.0, "step/lr": 0.5}, 20)
    log.close()
    assert board(tmp_path / "run") == {
        "loss": [(10, 2.5), (20, 1.25)],
        "top_1/8": [(10, 62.5), (20, 75.0)],
        "step/lr": [(20, 0.5)],
    }


def test_a_resumed_run_drops_lines_after_its_checkpoint(tmp_path):
    path = tmp_path / "run"
    log = RunLog(path, {}, "")
    for epoch in range(3):
        log.write_line({"epoch": epoch, "train_loss": 3.0 - epoch})
        log.write_scalars({"loss": 3.0 - epoch}, 10 * (epoch + 1))
    log.write_event({"event": "skipped", "step": 12})
    log.close()
    with open(path / "log", "a") as file:
        file.write('{"timestamp": 1, "epo')  # killed
    log = RunLog(path, {}, "", resumed_at=(20, 2))
    log.write_line({"epoch": 2, "train_loss": 0.5})
    log.write_scalars({"loss": 0.5}, 30)
    log.close()
    assert [(line["epoch"], line["train_loss"]) for line in lines(path / "log")] == [
        (0, 3.0),
        (1, 2.0),
        (2, 0.5),
    ]
    assert [line["event"] for line in lines(path / "events.jsonl")] == ["skipped"]
    assert board(path)["loss"] == [(10, 3.0), (20, 2.0), (30, 0.5)]


def test_metrics_under_the_names_of_log_and_tensorboard():
    accuracy = {8: {"top1": 50.0, "top5": 75.0}, 16: {"top1": 60.0, "top5": 80.0}}
    speed = {"images_per_s": 9.0, "data_wait": 0.5}
    base = {"loss": 2.0, "lr": 0.1, "gradient_norm": 3.0, **speed, "loss/8": 2.5, "loss/16": 1.5}
    assert log_line(base, 3) == {"current_lr": 0.1, "train_loss": 2.0, "epoch": 3, **speed}
    assert epoch_scalars(base) == base

    metrics = base | {"val_time": 7.0} | accuracy_metrics(accuracy)
    metrics |= accuracy_metrics(accuracy, prefix="ema_")
    line = log_line(metrics, 0)
    assert list(line) == [
        *("current_lr", "val_time"),
        *("top_1_8", "top_1_16", "top_5_8", "top_5_16"),
        *("ema_top_1_8", "ema_top_1_16", "ema_top_5_8", "ema_top_5_16"),
        *("train_loss", "epoch", "images_per_s", "data_wait"),
    ]
    assert (line["top_1_8"], line["ema_top_5_16"]) == (0.5, 0.8), "fractions"
    top1 = {"top_1/8": 50.0, "top_1/16": 60.0, "ema_top_1/8": 50.0, "ema_top_1/16": 60.0}
    assert epoch_scalars(metrics) == base | top1, "percent"

    single = log_line(base | {"val_time": 7.0} | accuracy_metrics({8: accuracy[8]}), 0)
    assert (single["top_1"], single["top_5"]) == (0.5, 0.75), "upstream's keys of one prefix"


# ---------------------------------------------------------------- Weights & Biases


def records(path):
    """The records of the offline run of Weights & Biases below a run folder, once its own process
    has written all.
    """
    (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 30  # `finish` comes back a little earlier
    while True:
        found = whole_records(file)
        if any(record.HasField("exit") for record in found) or time.monotonic() > until:
            return found
        time.sleep(0.02)


def whole_records(file):
    """What is in a .wandb file so far.

    Blocks of 32 KiB after a file header of 7 bytes; a piece of a record is [crc32, length: u16,
    kind: u8], data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a piece's header is never split
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def history(found):
    rows = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in found
    ]
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in rows if row]


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_has_what_was_logged(tmp_path, offline):
    path = tmp_path / "my run"
    log = RunLog(path, {"lr.lr": 0.5, "model.dims": [8, 16]}, "", wandb="project")
    log.write_scalars({"step/loss": 4.0}, 3)
    log.write_line({"current_lr": 0.1, "top_1_8": 0.625, "epoch": 0})
    log.write_scalars({"loss": 2.5}, 10)
    log.write_scalars({"loss": 3.5}, 7)  # after a rollback
    log.close()
    found = records(path)
    assert history(found) == [
        {"step/loss": 4.0, "step": 3},
        {"epoch/current_lr": 0.1, "epoch/top_1_8": 0.625, "epoch": 0},
        {"loss": 2.5, "step": 10},
        {"loss": 3.5, "step": 7},
    ]
    run = next(r.run for r in found if r.HasField("run"))
    assert (run.project, run.display_name, run.run_id) == (
        "project",
        "my run",
        (path / "wandb_id").read_text().strip(),
    )
    assert run.run_id.startswith("my-run-")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["lr.lr"], config["model.dims"]) == (0.5, [8, 16])
    axes = {r.metric.name: r.metric.step_metric for r in found if r.HasField("metric")}
    assert axes.items() >= {"loss": "step", "step/loss": "step", "epoch/top_1_8": "epoch"}.items()
    assert [line["top_1_8"] for line in lines(path / "log")] == [0.625]
    assert board(path)["loss"] == [(10, 2.5), (7, 3.5)]


def test_wandb_resumes_the_run_of_this_folder(tmp_path, offline):
    ids = []
    for path, resumed_at in (
        (tmp_path / "run", None),
        (tmp_path / "run", (5, 1)),
        (tmp_path / "other" / "run", None),
    ):
        RunLog(path, {}, "", resumed_at=resumed_at, wandb="project").close()
        ids.append(next(r.run.run_id for r in records(path) if r.HasField("run")))
        shutil.rmtree(path / "wandb")
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("call", ["log", "finish"])
def test_wandb_that_breaks_does_not_end_a_run(tmp_path, offline, monkeypatch, call):
    import wandb

    def broken(*_):
        raise BrokenPipeError("gone")

    log = RunLog(tmp_path / "run", {}, "", wandb="project")
    monkeypatch.setattr(wandb.Run, call, broken)
    for step in (1, 2):
        log.write_scalars({"loss": 1.0}, step)
    log.close()
    monkeypatch.undo()
    wandb.finish()
    problems = lines(tmp_path / "run" / "events.jsonl")
    assert [(line["event"], "gone" in line["text"]) for line in problems] == [("problem", True)]
    assert len(board(tmp_path / "run")["loss"]) == 2, "TensorBoard must get both steps"


def test_mistakes_with_wandb_are_one_line_and_leave_no_folder(tmp_path, offline, monkeypatch):
    import wandb

    def refuses(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login`.\nmore")

    monkeypatch.setattr(wandb, "init", refuses)
    with pytest.raises(
        WandbError, match=r"^logging\.wandb=p: No API key.*`wandb login`; .*WANDB_MODE=offline$"
    ):
        RunLog(tmp_path / "run", {}, "", wandb="p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(WandbError, match=r"^logging\.wandb=p: .*`pip install wandb`$"):
        RunLog(tmp_path / "run", {}, "", wandb="p")
    assert os.listdir(tmp_path) == []


def test_a_session_hands_its_project_on(tmp_path, monkeypatch):
    given = []

    def run_log(*_, wandb, **__):
        given.append(wandb)
        return SimpleNamespace(write_event=lambda _: None)

    monkeypatch.setattr(session, "RunLog", run_log)
    loader = SimpleNamespace(batch_size=1)
    state = SimpleNamespace(loop=LoopState(), metadata={}, loader=loader)
    for more in ({}, {"wandb": "project"}):
        session.Session(
            state,
            None,
            World(torch.device("cpu")),
            session.ResumePoint(tmp_path),
            options=session.SessionOptions(best_metric="top_1/8", **more),
            config={},
            config_yaml="",
            print0=print,
        )
    assert given == [None, "project"]


def test_short_epochs_do_not_wait_for_the_disk_for_long(tmp_path, monkeypatch):
    """An epoch's checkpoint is left to a later step once the disk has cost more than its share."""
    saved = []
    disk = SimpleNamespace(is_writing=True, waited=0.0, problems=list)
    disk.save = lambda step, tensors, values, best: saved.append((step, best))
    sums = SimpleNamespace(totals=torch.zeros(2), reset=lambda: None)
    loop = LoopState()
    state = SimpleNamespace(loop=loop, metadata={}, loader=SimpleNamespace(batch_size=1), sums=sums)
    state.tensors, state.values = (lambda totals: {}), dict
    run = session.Session(
        state,
        SimpleNamespace(after_step=lambda *_, **__: []),
        World(torch.device("cpu")),
        session.ResumePoint(tmp_path),
        options=session.SessionOptions(best_metric="top_1/8", epochs=6, tensorboard=False),
        config={},
        config_yaml="",
        print0=print,
    )
    run.snapshots = disk

    def epoch(**metrics):
        run.after_step(*torch.zeros(3))
        run.epoch_done(metrics)

    epoch()
    assert saved == [(1, False)]  # it may wait: nothing was waited for yet
    disk.waited = 2.0
    epoch()
    assert saved == [(1, False)]
    disk.is_writing = False  # the postponed one follows after the next step, in its epoch
    run.after_step(*torch.zeros(3))
    assert saved == [(1, False), (3, False)]
    disk.is_writing = True
    epoch(**{"top_1/8": 50.0})
    assert saved[2:] == [(4, True)], "the best one always"
    monkeypatch.setattr(session.time, "monotonic", lambda: run._began + 100)
    epoch()
    assert saved[3:] == [(5, False)], "2 of 100 seconds are a small share"
    monkeypatch.undo()
    epoch()
    assert saved[4:] == []
    epoch()
    assert saved[4:] == [(7, False)], "the last epoch always"
    run.log.close()
