"""Rivals for one run folder: one owner at a time, however its processes end."""

import errno
import fcntl
import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from attacks.scale import scaled
from matryoshka.inference import adapt
from matryoshka.train import linear_probe, train_cifar10, train_imagenet, train_ssl
from training_commands import refused

from matryoshka import cli
from matryoshka.checkpoint.model_file import save_model
from matryoshka.fitting import fit
from matryoshka.models import ModelSpec, build
from matryoshka.training import run_lock
from matryoshka.training.run_lock import LockError, RunInUse, RunLock, holder, is_unused
from matryoshka.training.session import resolve_run


def forked(work):
    """Run `work` in a fork; its process id. The status is what it returns."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_of_many_starts_gets_the_folder(tmp_path):
    """Every winner notes that it is alone: an overlap would find another's note."""
    for number in range(scaled(5, 200)):
        folder = tmp_path / str(number)
        inside = tmp_path / f"inside-{number}"

        def start(folder=folder, inside=inside):
            try:
                with RunLock(folder, patience=0.3):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where it exists
                    time.sleep(0.02)
                    inside.unlink()
            except RunInUse as error:
                return 2 if " by process " in str(error) and "\n" not in str(error) else 98
            return 0

        codes = [status_of(pid) for pid in [forked(start) for _ in range(8)]]
        assert set(codes) <= {0, 2}, codes
        assert 0 in codes
        assert not any(folder.glob("*")), "a lock file is left"


def test_a_killed_owner_frees_the_folder_at_once(tmp_path):
    """Also where a child of it lives on, as a worker of a data loader does."""
    read, write = os.pipe()

    def own():
        lock = RunLock(tmp_path / "run")
        child = forked(lambda: time.sleep(60) or 0)
        os.write(write, b"%d\n" % child)
        time.sleep(60)
        lock.release()
        return 0

    owner = forked(own)
    child = int(os.read(read, 100))
    try:
        with pytest.raises(RunInUse, match=rf"run: in use by process {owner} on .* since 20\d\d-"):
            RunLock(tmp_path / "run", patience=0)
        assert f"process {owner} " in holder(tmp_path / "run")
        os.kill(owner, signal.SIGKILL)
        assert status_of(owner) == -signal.SIGKILL
        assert holder(tmp_path / "run") is None
        with RunLock(tmp_path / "run", patience=0):
            assert f"process {os.getpid()} " in holder(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_folder_that_is_removed_under_its_owner(tmp_path):
    run = tmp_path / "run"
    with RunLock(run) as lock:
        lock.renew()
        (run / run_lock.LOCK).unlink()
        assert holder(run) is None
        lock.renew()
        assert holder(run) is not None
        (run / run_lock.LOCK).unlink()
        run.rmdir()
        with RunLock(run), pytest.raises(RunInUse, match=f"process {os.getpid()} "):
            lock.renew()
    assert not run.exists()


def test_the_lock_is_not_something_of_a_run(tmp_path):
    run = tmp_path / "deep" / "run"
    assert is_unused(run)
    with RunLock(run):
        assert is_unused(run)
        (run / "params.json").write_text("{}")
        assert not is_unused(run)
    assert [path.name for path in run.iterdir()] == ["params.json"]
    with RunLock(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with ExitStack() as held:
        point = resolve_run(tmp_path, "run", None, {}, held=held)
        assert len(point.notes) == 1
        assert "has no locks" in point.notes[0]
        assert point.lock is not None
        point.lock.renew()


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "link", "device"])
def test_a_lock_file_that_is_none(tmp_path, kind):
    path = tmp_path / run_lock.LOCK
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link":
        (tmp_path / "precious").write_text("x")
        path.symlink_to("precious")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(LockError, match=run_lock.LOCK) as refusal:
        RunLock(tmp_path)
    assert "\n" not in str(refusal.value)
    assert holder(tmp_path) is None
    if kind == "link":
        assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 7}', '{"pid": "7"}', "[" * 9000, '{"pid":1,"host":"a\\nb"']
)
def test_a_damaged_text_of_the_owner(tmp_path, text):
    with RunLock(tmp_path) as lock:
        lock._path.write_text(text)
        assert holder(tmp_path) == "in use by another process"


def test_an_owner_cannot_write_on_the_terminal(tmp_path):
    with RunLock(tmp_path) as lock:
        about = {"pid": 1, "host": "\x1b[2J", "since": "now"}
        lock._path.write_text(json.dumps(about))
        assert holder(tmp_path) == "in use by another process"


# ---------------------------------------------------------------- every program with a run folder


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    path = tmp_path_factory.mktemp("frozen") / "model.safetensors"
    save_model(build(ModelSpec("resnet10", 10, (8, 512))), path)
    return path


def contents(folder: Path):
    found = {}
    for path in sorted(folder.rglob("*")):
        found[path.name] = path.read_bytes() if path.is_file() else None
    return found


PROGRAMS = ("train", "resume", "checkpoint", "cifar", "ssl", "probe")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_refuses_a_folder_in_use(digits, tmp_path, frozen, capsys, program):
    sets = [f"--data.train_dataset={digits['train']}", f"--data.val_dataset={digits['val']}"]
    own = [f"--logging.folder={tmp_path}", "--logging.run_id=run"]
    small = ["--data", f"{digits['train']},{digits['val']}", "--nowandb"]
    file = tmp_path / "run" / "checkpoints" / "step_3.safetensors"
    main, words = {
        "train": (train_imagenet.main, [*sets, *own]),
        "resume": (train_imagenet.main, [*sets, *own, "--training.resume=auto"]),
        "checkpoint": (train_imagenet.main, [*sets, *own, f"--training.resume={file}"]),
        "cifar": (train_cifar10.main, [*small, *own]),
        "ssl": (train_ssl.main, ["--data", str(digits["train"]), "--method=simclr", *own]),
        "probe": (linear_probe.main, [*sets, *own, f"--model.path={frozen}"]),
    }[program]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of the run that is alive")
    (tmp_path / "run" / "log").write_text('{"epoch": 0}\n')
    with RunLock(tmp_path / "run"):
        before = contents(tmp_path)
        line = refused(main, words, capsys)
        assert contents(tmp_path) == before
    if program != "probe":  # it never writes into a folder that is not empty
        assert f"{tmp_path / 'run'}: in use by process {os.getpid()} on " in line
        assert "--logging.run_id" in line


def test_adapt_and_fit_refuse_a_folder_in_use(tmp_path, folder, capsys):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((64, 8), np.float32))
    words = ["--embeddings", str(tmp_path / "rows.npy"), "--output", str(tmp_path / "out")]
    with RunLock(tmp_path / "out"):
        line = refused(adapt.main, words, capsys)
    assert f"{tmp_path / 'out'}: in use by process {os.getpid()} on " in line
    assert "--output" in line
    with RunLock(tmp_path / "out", "fit.lock"):
        with pytest.raises(RunInUse, match=r"in use by process .* --output"):
            fit(folder, output=tmp_path / "out")
        capsys.readouterr()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- matryoshka runs


@pytest.mark.parametrize("inside", [False, True])
def test_runs_lists_the_others_beside_a_link_that_leads_nowhere(tmp_path, capsys, inside):
    """A link to itself, a circle of two, and one to nothing; beside the runs, and in a run."""
    good = tmp_path / "good"
    good.mkdir()
    (good / "params.json").write_text('{"model.arch": "resnet18"}')
    where = good if inside else tmp_path
    for name, target in (("loop", "loop"), ("one", "two"), ("two", "one"), ("dead", "gone")):
        (where / name).symlink_to(target)
    if inside:
        for name in ("log", "events.jsonl", "checkpoints", "tensorboard", "model.safetensors"):
            (where / name).symlink_to(name)
    assert cli.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\ngood  resnet18" in out
    if not inside:
        said = out.splitlines()[-1]
        assert f"{tmp_path}/loop (Too many levels of symbolic links)" in said
        assert f"{tmp_path}/dead (No such file or directory)" in said


def test_runs_knows_a_run_that_is_silent_but_alive(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "params.json").write_text('{"model.arch": "resnet18"}')
    for path in (run, run / "params.json"):
        os.utime(path, (0, 0))

    def state():
        assert cli.main(["runs", str(tmp_path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["state"]

    assert state() == "failed"
    with RunLock(run):
        os.utime(run / run_lock.LOCK, (0, 0))
        assert state() == "running"


def test_runs_knows_at_once_that_a_run_was_killed(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "params.json").write_text('{"model.arch": "resnet18"}')

    def state():
        assert cli.main(["runs", str(tmp_path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["state"]

    def own():
        RunLock(run)
        time.sleep(60)
        return 0

    assert state() == "running", "without a lock, a run that has just written is alive"
    owner = forked(own)
    while holder(run) is None:
        time.sleep(0.01)
    assert state() == "running"
    os.kill(owner, signal.SIGKILL)
    assert status_of(owner) == -signal.SIGKILL
    assert state() == "failed"

    text = (run / run_lock.LOCK).read_text()
    with RunLock(run):
        assert state() == "running", "another process has taken it over"
    assert state() == "running", "a lock that was given back says nothing"
    other = json.loads(text) | {"host": "elsewhere"}
    for unclear in (json.dumps(other), "", "{", "[]", '{"pid": 7}'):
        (run / run_lock.LOCK).write_text(unclear)
        assert state() == "running", unclear
    (run / run_lock.LOCK).write_text(text)
    assert state() == "failed"

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert state() == "running", "nobody can tell"
