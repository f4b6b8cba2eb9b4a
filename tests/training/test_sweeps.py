"""Sweeps: W&B's files against its own functions and SciPy, studies of a small program, kills."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.train import sweep as program
from PIL import Image
from scipy import stats
from training_commands import refused

from matryoshka.report.plots import plot_importances
from matryoshka.training import sweep_trial, sweeps
from matryoshka.training.sweep_file import SweepError, command_line, read_sweep
from matryoshka.training.sweep_trial import Log, find_program, metric_of
from matryoshka.training.sweeps import SweepOptions, best_first, importances, read_study, run_sweep

ROOT = Path(__file__).resolve().parents[2]
ADAN = ROOT / "sweeps" / "adan_betas_decay.yaml"

# Logs an accuracy that is best at x = 3 and grows from epoch to epoch; a SIGTERM leaves a file.
PROGRAM = """
import json, os, signal, sys, time
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder = os.path.join(given["logging.folder"], given["logging.run_id"])
os.makedirs(folder)
def ended(*_):
    open(os.path.join(folder, "ended"), "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, ended)
if "status" in given:
    print("some text\\nerror: --status: refused")
    sys.exit(int(given["status"]))
x, epochs = float(given["x"]), int(given.get("epochs", 2))
with open(os.path.join(folder, "log"), "a", buffering=1) as log:
    for epoch in range(epochs):
        is_slow = epoch > 0 and x > float(given.get("slow_above", 10))
        time.sleep(60 if is_slow else float(given.get("delay", 0)))
        top = (1 - abs(x - 3) / 10) * (epoch + 1) / epochs
        log.write(json.dumps({"epoch": epoch, "top_1_8": 0.1, "top_1_16": top, "loss": x}) + "\\n")
"""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(sweeps, "POLL", 0.02)


def sweep_of(folder, **changes):
    """A sweep of PROGRAM over x from 0 to 10."""
    (folder / "program.py").write_text(PROGRAM)
    content = {
        "program": str(folder / "program.py"),
        "method": "random",
        "metric": {"name": "val_acc", "goal": "maximize"},
        "parameters": {"x": {"min": 0.0, "max": 10.0}},
    } | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return read_sweep(path)


def parameter(folder, **facts):
    return sweep_of(folder, parameters={"x": facts, "y": {"values": [1, 2]}}).parameters[0]


# ---------------------------------------------------------------- W&B's files


def exponentials(low, high):
    return lambda u: np.exp(low + u * (high - low))


# {distribution: (its keys, its quantile function by the text of W&B's documentation)}
QUANTILES = {
    "uniform": ({"min": -1.5, "max": 4.0}, lambda u: -1.5 + 5.5 * u),
    "q_uniform": ({"min": 0.01, "max": 0.05, "q": 0.005}, lambda u: 0.01 + 0.04 * u),
    "log_uniform": ({"min": -3, "max": 2}, exponentials(-3, 2)),
    "q_log_uniform": ({"min": -3, "max": 2, "q": 0.25}, exponentials(-3, 2)),
    "inv_log_uniform": ({"min": -3, "max": 2}, exponentials(-2, 3)),
    "log_uniform_values": (
        {"min": 1e-4, "max": 2e-3},
        exponentials(math.log(1e-4), math.log(2e-3)),
    ),
    "q_log_uniform_values": (
        {"min": 1e-4, "max": 2e-3, "q": 1e-4},
        exponentials(math.log(1e-4), math.log(2e-3)),
    ),
    "inv_log_uniform_values": (
        {"min": 1e-4, "max": 2e-3},
        exponentials(math.log(1e-4), math.log(2e-3)),
    ),
    "normal": ({"mu": 2.0, "sigma": 0.5}, stats.norm(2, 0.5).ppf),
    "q_normal": ({"q": 2}, stats.norm(0, 1).ppf),
    "log_normal": ({"mu": 1.0, "sigma": 0.5}, stats.lognorm(0.5, scale=math.e).ppf),
    "q_log_normal": ({"mu": 1.0, "sigma": 0.5, "q": 0.1}, stats.lognorm(0.5, scale=math.e).ppf),
    "beta": ({"a": 2, "b": 3}, stats.beta(2, 3).ppf),
    "q_beta": ({"q": 0.125}, stats.beta(1, 1).ppf),
}


@pytest.mark.parametrize("distribution", QUANTILES)
def test_a_distribution_equals_its_definition(tmp_path, distribution):
    facts, quantile = QUANTILES[distribution]
    read = parameter(tmp_path, distribution=distribution, **facts)
    domain = read.domain()

    @settings(max_examples=50)
    @given(u=st.floats(1e-3, 1 - 1e-3))
    def check(u):
        low, high = domain.low, domain.high
        drawn = low * (high / low) ** u if domain.log else low + u * (high - low)
        value, expected = read.value(drawn), quantile(u)
        if "q" in facts:
            multiple = value / facts["q"]
            assert multiple == pytest.approx(round(multiple), abs=1e-6)
            assert abs(value - expected) <= facts["q"] * (0.5 + 1e-6)
            assert len(repr(value)) < 10, "not a number as one would type it"
        else:
            assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)

    check()
    if "q" in facts:
        assert isinstance(read.value(0.3), type(facts["q"]))


def test_choices_keep_their_types(tmp_path):
    values = [1, True, 1.0, "1", None, [8, 16], "adam"]
    read = parameter(tmp_path, values=values)
    drawn = [read.value(text) for text in read.domain().choices]
    assert list(map(repr, drawn)) == list(map(repr, values))
    weighted = parameter(tmp_path, values=["a", "b", "c"], probabilities=[0.2, 0, 0.8])
    assert [weighted.value(u) for u in (0.0, 0.19, 0.21, 0.99)] == ["a", "a", "c", "c"]
    whole = parameter(tmp_path, min=2, max=5)
    assert (whole.distribution, whole.grid()) == ("int_uniform", [2, 3, 4, 5])
    assert parameter(tmp_path, min=2, max=5.5).distribution == "uniform"
    steps = parameter(tmp_path, distribution="q_uniform", min=0.0, max=0.05, q=0.02)
    assert [steps.value(drawn) for drawn in steps.grid()] == [0.0, 0.02, 0.04]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "bayse"}, ["method='bayse'", "grid, random, bayes", "did you mean 'bayes'"]),
        ({"metric": {"goal": "maximize"}}, ["metric.name"]),
        ({"metric": {"name": "a", "goal": "most"}}, ["metric.goal='most'", "maximize"]),
        ({"metric": {"name": "a", "impute": "best"}}, ["metric", "'impute'", "not supported"]),
        ({"methods": "grid"}, ["'methods'", "did you mean 'method'"]),
        ({"parameters": {"x": {"value": 1}}}, ["parameters", "varies"]),
        ({"parameters": {"x": {}}}, ["parameters.x", "distribution"]),
        ({"parameters": {"x": 1}}, ["parameters.x", "expected"]),
        ({"parameters": {"x": {"values": []}}}, ["parameters.x.values"]),
        ({"parameters": {"x": {"min": 3, "max": 1}}}, ["parameters.x", "min=3", "max=1"]),
        ({"parameters": {"x": {"min": "a", "max": 1}}}, ["parameters.x.min", "number"]),
        ({"parameters": {"x": {"min": 1, "max": 3, "mu": 1}}}, ["parameters.x", "'mu'"]),
        (
            {"parameters": {"x": {"distribution": "loguniform", "min": 1, "max": 2}}},
            ["parameters.x", "'loguniform'", "did you mean 'log_uniform'", "q_beta"],
        ),
        (
            {"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 2}}},
            ["parameters.x.min=0", "logarithm"],
        ),
        (
            {"parameters": {"x": {"distribution": "q_uniform", "min": 0, "max": 2, "q": 0}}},
            ["parameters.x.q=0", "more than 0"],
        ),
        (
            {"parameters": {"x": {"values": [1, 2], "probabilities": [0.5, 0.6]}}},
            ["parameters.x.probabilities", "sum of 1"],
        ),
        ({"parameters": {"x": {"parameters": {"y": {"value": 1}}}}}, ["nested", "x.inner"]),
        ({"method": "grid"}, ["method: grid", "uniform"]),
        ({"early_terminate": {"type": "envelope"}}, ["early_terminate.type", "hyperband"]),
        ({"early_terminate": {"type": "hyperband"}}, ["min_iter", "max_iter"]),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, ["min_iter=0"]),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": True}},
            ["'strict'", "not supported"],
        ),
        ({"run_cap": 0}, ["run_cap=0"]),
        ({"command": "python"}, ["command"]),
    ],
    ids=str,
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, changes, words):
    with pytest.raises(SweepError) as caught:
        sweep_of(tmp_path, **changes)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'sweep.yaml'}: ")
    assert "\n" not in text
    assert all(word in text for word in words), text


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "sweep.yaml"
    path.write_bytes(content)
    with pytest.raises(SweepError) as caught:
        read_sweep(path)
    assert "\n" not in str(caught.value)


def test_stopping_is_that_of_the_file(tmp_path):
    def stopping(**facts):
        return sweep_of(tmp_path, early_terminate={"type": "hyperband", **facts}).stopping

    read = stopping(min_iter=3)
    assert (read.first, read.eta, read.last) == (3, 3, None)
    read = stopping(max_iter=27, s=2, eta=3)  # W&B's bands: 9 and 3
    assert (read.first, read.eta, read.last) == (3, 3, 27)


def test_the_sweep_of_adan_is_the_published_one():
    """And W&B reads it: with its own client, and the schema of the package `sweeps`."""
    sweep = read_sweep(ADAN)
    assert (sweep.method, sweep.metric, sweep.maximise) == ("bayes", "val_acc", True)
    assert (sweep.stopping.first, sweep.stopping.eta) == (3, 3)
    facts = {p.name: (p.distribution, *p.facts.values()) for p in sweep.parameters}
    assert facts == {
        "net": ("constant", "vit_small"),
        "n_epochs": ("constant", 5),
        "opt": ("constant", "adan"),
        "lr": ("q_log_uniform_values", 1e-4, 2e-3, 1e-4),
        "adan_beta1": ("q_uniform", 0.01, 0.05, 0.005),
        "adan_beta2": ("q_uniform", 0.05, 0.15, 0.01),
        "adan_beta3": ("q_uniform", 0.005, 0.03, 0.005),
        "weight_decay": ("q_uniform", 0.0, 0.05, 0.005),
    }
    client = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    content = client.load_sweep_config(str(ADAN))
    assert content["program"] == sweep.program
    assert {name: dict(p) for name, p in content["parameters"].items()}.keys() == facts.keys()


def test_the_sweep_of_adan_has_the_schema_of_wandb():
    schema = pytest.importorskip("sweeps.config.schema", reason="needs sweeps, and NumPy below 2")
    assert list(schema.validator.iter_errors(yaml.safe_load(ADAN.read_text()))) == []


@pytest.mark.parametrize(
    "style", ["args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags", "args_json"]
)
def test_flags_are_those_of_wandb(tmp_path, style):
    client = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    values = {"lr": 0.0009, "net": "vit", "noamp": True, "resume": False, "dims": [8, 16], "n": 3}
    theirs = client.create_sweep_command_args(
        {"args": {name: {"value": value} for name, value in values.items()}}
    )
    sweep = sweep_of(tmp_path, command=["${env}", "${interpreter}", "${program}", f"${{{style}}}"])
    ours = command_line(sweep, ["a.py"], values, ["--more"])
    assert ours == ["/usr/bin/env", sys.executable, "a.py", *theirs[style], "--more"]


def test_macros(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_DATA", "/data")
    sweep = sweep_of(tmp_path, command=["run", "--data=${envvar:MY_DATA}/x", 3])
    assert command_line(sweep, ["a.py"], {"x": 1}, []) == ["run", "--data=/data/x", "3"]
    for macro, word in (("${envvar:NOT_SET}", "NOT_SET"), ("${argz}", "argz")):
        with pytest.raises(SweepError, match=word):
            command_line(sweep_of(tmp_path, command=[macro]), ["a.py"], {}, [])


def test_programs_are_found(tmp_path, monkeypatch):
    beside = tmp_path / "sweep.yaml"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert find_program("train/sweep.py", beside) == [str(ROOT / "train" / "sweep.py")]
    assert find_program("sweep.py", beside) == [str(ROOT / "train" / "sweep.py")]
    (tmp_path / "mine.py").touch()
    assert find_program("mine.py", beside) == [str(tmp_path / "mine.py")]
    monkeypatch.chdir(tmp_path)
    assert find_program("mine.py", beside) == ["mine.py"]
    for name in ("train", "matryoshka train"):
        assert find_program(name, beside) == ["-m", "matryoshka.cli", "train"]
    with pytest.raises(SweepError, match=r"yours\.py is not in"):
        find_program("yours.py", beside)


# ---------------------------------------------------------------- the log


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ({"top_1_8": 0.1, "top_1_16": 0.2, "top_1_100": 0.25}, "val_acc", 25.0),
        ({"top_1": 0.5, "top_5": 0.75}, "val_acc", 50.0),
        ({"val_acc": 33.0, "top_1": 0.5}, "val_acc", 33.0),
        ({"top_1_16": 0.2}, "top_1_16", 0.2),
        ({"top_1_16": 0.2}, "top_1", None),
        ({"ema_top_1_16": 0.2}, "val_acc", None),
        ({"train_loss": 2}, "train_loss", 2.0),
        ({"train_loss": "2"}, "train_loss", None),
        ({"train_loss": True}, "train_loss", None),
    ],
)
def test_a_metric_by_its_name(line, name, value):
    assert metric_of(line, name) == value


def test_a_log_that_is_being_written(tmp_path):
    path = tmp_path / "log"
    log = Log(path)
    assert log.new_lines() == []
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert log.new_lines() == [{"a": 1}]
    assert log.new_lines() == []
    with open(path, "ab") as file:
        file.write(b': 2}\n[3]\nnot json\n{"a": NaN}\n')
    lines = log.new_lines()
    assert lines[0] == {"b": 2}
    assert math.isnan(lines[1]["a"])
    assert log.names == {"a", "b"}


# ---------------------------------------------------------------- studies


def values_of(trials):
    return sorted(trial.values["x"] for trial in trials)


def test_a_search_finds_the_best_and_what_matters(tmp_path):
    parameters = {"x": {"min": 0.0, "max": 10.0}, "y": {"values": ["a", "b"]}}
    sweep = sweep_of(tmp_path, method="bayes", parameters=parameters)
    lines = []
    trials = run_sweep(sweep, tmp_path / "study", SweepOptions(trials=11), report=lines.append)
    assert [trial.number for trial in trials] == list(range(11))
    for trial in trials:
        assert (trial.state, trial.epochs) == ("complete", 2)
        assert trial.value == pytest.approx(100 - 10 * abs(trial.values["x"] - 3))
        assert (trial.folder / "log").exists()
    ranked = best_first(trials, sweep)
    assert [t.value for t in ranked] == sorted((t.value for t in trials), reverse=True)
    assert abs(ranked[0].values["x"] - 3) < 1.5
    assert len(lines) == 11
    assert f"val_acc {ranked[0].value:.6g}" in "\n".join(lines)
    shares = importances(sweep, tmp_path / "study")
    assert next(iter(shares)) == "x"
    assert shares["x"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_a_grid_runs_every_point_once(tmp_path):
    parameters = {"x": {"values": [1, 2, 3]}, "y": {"values": [True, False]}, "z": {"value": 0}}
    sweep = sweep_of(tmp_path, method="grid", parameters=parameters, run_cap=2)
    points = sorted(itertools.product([1, 2, 3], [True, False], [0]))
    for options, count in ((None, 2), (SweepOptions(trials=9, workers=2), 6)):
        trials = run_sweep(sweep, tmp_path / "study", options)
        ran = sorted(tuple(trial.values.values()) for trial in trials)
        assert len(set(ran)) == len(ran) == count
        assert set(ran) <= set(points)


def test_a_point_is_not_lost_with_a_worker_that_was_drawing_it(tmp_path):
    parameters = {"x": {"values": [1, 2]}, "y": {"values": [3, 4]}}
    sweep = sweep_of(tmp_path, method="grid", parameters=parameters, run_cap=1)
    run_sweep(sweep, tmp_path / "study")
    study = sweeps._load(sweeps._open(sweep, tmp_path / "study"))
    study.ask().suggest_categorical("x", ["1", "2"])  # and the process is killed
    trials = run_sweep(sweep, tmp_path / "study", SweepOptions(trials=4))
    ran = sorted(tuple(trial.values.values()) for trial in trials if trial.state == "complete")
    assert ran == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_a_bad_trial_is_pruned_by_a_signal(tmp_path):
    """min_iter 1: after the first epoch, the best third continues."""
    stopping = {"type": "hyperband", "min_iter": 1}
    parameters = {"x": {"values": [3, 4, 8, 9, 10]}, "slow_above": {"value": 3}}
    sweep = sweep_of(tmp_path, method="grid", parameters=parameters, early_terminate=stopping)
    trials = run_sweep(sweep, tmp_path / "study")
    by_x = {trial.values["x"]: trial for trial in trials}
    states = ["complete", "pruned", "pruned", "pruned", "pruned"]
    assert [by_x[x].state for x in (3, 4, 8, 9, 10)] == states
    for trial in trials:
        is_pruned = trial.state == "pruned"
        assert (trial.folder / "ended").exists() == is_pruned, "SIGTERM for pruned trials alone"
        assert trial.epochs == (1 if is_pruned else 2)
    assert best_first(trials, sweep) == [by_x[3]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed sweep of four trials tries."""
    folder = tmp_path_factory.mktemp("whole")
    return values_of(run_sweep(sweep_of(folder), folder / "study", SweepOptions(trials=4)))


def test_a_sweep_that_is_continued_is_the_sweep_that_was_not_interrupted(tmp_path, whole):
    sweep = sweep_of(tmp_path)
    for trials in (1, 3, 4):
        parts = run_sweep(sweep, tmp_path / "study", SweepOptions(trials=trials))
        assert len(parts) == trials
    assert values_of(parts) == whole
    other = run_sweep(sweep, tmp_path / "other", SweepOptions(trials=3, seed=1))
    assert not set(values_of(other)) & set(whole)


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def started(study):
    """Programs that have made their run folder."""
    return len(list(study.glob("trials/*/")))


def test_trials_that_were_stopped_are_repeated(tmp_path, whole):
    sweep = sweep_of(tmp_path)
    study = tmp_path / "study"
    stop = threading.Event()

    def stop_soon():
        wait_for(lambda: started(study) == 2)
        stop.set()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    slow = SweepOptions(trials=4, workers=2, extra=("--delay=60",))
    assert run_sweep(sweep, study, slow, stop=stop) == []
    thread.join()
    after = run_sweep(sweep, study, SweepOptions(trials=4))
    assert values_of(after) == whole
    assert {trial.state for trial in after} == {"complete"}
    assert len(list(study.glob("trials/*/ended"))) == 2, "both programs got a SIGTERM"


def test_a_sweep_that_is_killed_continues(tmp_path, whole):
    """The programs that it leaves are ended, their trials repeated; none is lost or doubled."""
    sweep = sweep_of(tmp_path)
    study = tmp_path / "study"
    words = [sys.executable, "-m", "matryoshka.train.sweep", str(sweep.path), f"--study={study}"]
    words += ["--trials=4", "--workers=2", "--", "--delay=60"]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    wait_for(lambda: started(study) == 2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    lines = []
    trials = run_sweep(sweep, study, SweepOptions(trials=4), report=lines.append)
    assert sum("is repeated" in line for line in lines) == 2
    assert values_of(trials) == whole
    assert {trial.state for trial in trials} == {"complete"}
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert f"--logging.folder={study}" not in left.stdout


def test_a_kill_before_the_program_is_noted_leaves_none(tmp_path):
    """The sweep dies between the start of the program and the note of its id."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from matryoshka.training.sweep_trial import Process\n"
        "process = Process(['touch', sys.argv[1]], Path(sys.argv[2]))\n"
        "print(process.identity(), flush=True)\n"
        "if sys.argv[3] == 'begin': process.begin()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    trace = tmp_path / "trace"
    words = [sys.executable, "-c", code, str(trace), str(tmp_path / "out")]
    killed = subprocess.run([*words, ""], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    wait_for(lambda: not sweep_trial.is_alive(killed.stdout.strip()))
    assert not trace.exists()
    noted = subprocess.run([*words, "begin"], capture_output=True, text=True, check=False)
    wait_for(lambda: not sweep_trial.is_alive(noted.stdout.strip()))
    assert trace.exists()


def test_a_program_that_waits_can_be_stopped(tmp_path):
    process = sweep_trial.Process(["touch", str(tmp_path / "trace")], tmp_path / "out")
    assert process.status() is None
    process.stop()
    assert process.status() == -signal.SIGTERM
    assert not (tmp_path / "trace").exists()
    with pytest.raises(SweepError, match="cannot start no-such-program: no such program"):
        sweep_trial.Process(["no-such-program"], tmp_path / "out")


def test_two_sweeps_share_a_study(tmp_path, whole):
    """Each with a connection of its own, as two processes have; both see four trials in all."""
    sweep = sweep_of(tmp_path)
    found = []

    def run():
        options = SweepOptions(trials=4, extra=("--delay=0.05",))
        run_sweep(sweep, tmp_path / "study", options)
        found.append(values_of(read_study(sweep, tmp_path / "study")))

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(found) == 2
    assert found[-1] == whole
    assert len(list((tmp_path / "study" / "trials").glob("*/log"))) == 4


def test_a_process_that_has_ended_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = sweep_trial.identity(child.pid)
    assert sweep_trial.is_alive(known)
    host, pid, start = known.split(" ", 2)
    assert not sweep_trial.is_alive(f"{host} {pid} {start}1")  # the id of another process
    assert sweep_trial.is_alive(f"another-{host} {pid} {start}1")  # which cannot be asked
    child.kill()
    wait_for(lambda: not sweep_trial.is_alive(known))  # a zombie, until it is waited for
    child.communicate()
    assert not sweep_trial.is_alive(known)
    assert sweep_trial.is_alive(sweep_trial.identity(os.getpid()))


def test_time_and_target_end_a_sweep(tmp_path):
    sweep = sweep_of(tmp_path)
    trials = run_sweep(sweep, tmp_path / "time", SweepOptions(timeout=0.5, extra=("--delay=0.1",)))
    assert 1 <= len(trials) <= 5
    assert {trial.state for trial in trials} == {"complete"}
    goal = {"name": "loss", "goal": "minimize", "target": 5}
    parameters = {"x": {"values": [9, 8, 4, 7, 6]}}
    sweep = sweep_of(tmp_path, method="grid", metric=goal, parameters=parameters)
    trials = run_sweep(sweep, tmp_path / "target")
    assert [trial.value for trial in trials] == [9, 8, 4]


# ---------------------------------------------------------------- failures


def test_a_program_that_fails(tmp_path):
    sweep = sweep_of(tmp_path)
    with pytest.raises(SweepError, match="trial_00000 failed, status 2: error: --status: refused"):
        run_sweep(sweep, tmp_path / "refused", SweepOptions(trials=5, extra=("--status=2",)))
    with pytest.raises(SweepError, match="trial_00002 failed, status 1"):
        run_sweep(sweep, tmp_path / "crash", SweepOptions(trials=5, extra=("--status=1",)))
    # Failed trials count: a value that always fails must not be tried for ever.
    trials = run_sweep(sweep, tmp_path / "crash", SweepOptions(trials=5))
    assert [trial.state for trial in trials] == ["failed"] * 3 + ["complete"] * 2
    assert all(trial.value is None for trial in trials[:3])


def test_a_metric_that_the_program_does_not_log(tmp_path):
    sweep = sweep_of(tmp_path, metric={"name": "val_los"})
    with pytest.raises(
        SweepError, match=r"metric val_los: .* it has epoch, loss, top_1_16, top_1_8"
    ):
        run_sweep(sweep, tmp_path / "study", SweepOptions(trials=2))


def test_refusals_of_the_program(tmp_path, capsys, monkeypatch):
    sweep = sweep_of(tmp_path)
    file = str(sweep.path)
    study = f"--study={tmp_path / 'study'}"

    def refusal(*argv):
        return refused(program.main, argv, capsys)

    assert "none.yaml: No such file" in refusal(str(tmp_path / "none.yaml"))
    assert "--trials" in refusal(file, study)
    assert "--workers 0" in refusal(file, study, "--trials=1", "--workers=0")
    assert "--run-flags" in refusal(file, study, "--trials=1", "--run-flags={folders}")
    assert "not the folder of a sweep" in refusal(file, study, "--trials=0")
    assert not (tmp_path / "study").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    text = refusal(file, f"--study={tmp_path / 'full'}", "--trials=1")
    assert "is not a sweep; give another folder (--study)" in text
    assert program.main([file, study, "--trials=1"]) == 0
    sweep_of(tmp_path, method="bayes")
    assert "has another method than" in refusal(file, study, "--trials=2")
    sweep_of(tmp_path, program="none.py")
    assert "none.py is not in" in refusal(file, study, "--trials=2")
    monkeypatch.setitem(sys.modules, "optuna", None)
    sweep_of(tmp_path)
    assert "pip install 'matryoshka-vision[sweep]'" in refusal(file, study, "--trials=2")


# ---------------------------------------------------------------- the program


def test_the_program_prints_a_table_and_saves_a_plot(tmp_path, capsys):
    sweep = sweep_of(tmp_path)
    argv = [str(sweep.path), f"--study={tmp_path / 'study'}", "--trials=4", "--top=3"]
    assert program.main([*argv, "--", "--epochs=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("trials   4 complete, 0 pruned, 0 failed")
    assert lines[at + 1].split() == ["trial", "val_acc", "epochs", "minutes", "x"]
    rows = [line.split() for line in lines[at + 2 : at + 5]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for _, number, value, epochs, _, x in rows:
        log = tmp_path / "study" / "trials" / f"trial_{int(number):05d}" / "log"
        last = json.loads(log.read_text().splitlines()[-1])
        assert float(value) == pytest.approx(100 * last["top_1_16"], rel=1e-5)
        assert float(x) == pytest.approx(last["loss"], rel=1e-5)
        assert epochs == "3"
    assert [float(row[2]) for row in rows] == sorted((float(r[2]) for r in rows), reverse=True)
    assert lines[at + 5].startswith("matters  x 100 %")
    shown = np.asarray(Image.open(tmp_path / "study" / "importance.png").convert("L"))
    assert shown.std() > 10, "an empty plot"
    argv[2] = "--trials=0"
    assert program.main(argv) == 0
    assert capsys.readouterr().out.splitlines() == lines[at:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_sweep_and_its_programs(tmp_path, capsys, number):
    sweep = sweep_of(tmp_path)
    study = tmp_path / "study"

    def send():
        wait_for(lambda: started(study) == 1)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    handler = signal.getsignal(number)
    argv = [str(sweep.path), f"--study={study}", "--trials=2", "--", "--delay=60"]
    assert program.main(argv) == 128 + number
    thread.join()
    assert signal.getsignal(number) is handler
    assert "the same command continues" in capsys.readouterr().err
    assert len(list(study.glob("trials/*/ended"))) == 1


def test_a_plot_of_importances(tmp_path):
    """The longer share has the longer bar, and is above."""
    plot_importances(tmp_path / "plot.png", {"lr": 0.75, "$x_{1": 0.25}, "val_acc, $name_{")
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int)
    blue = np.abs(pixels - [0x1F, 0x5F, 0xA8]).sum(2) < 30
    lengths = blue.sum(1)
    rows = np.flatnonzero(lengths > 20)
    first = lengths[rows[0] + 5]
    last = lengths[rows[-1] - 5]
    assert first / last == pytest.approx(3, rel=0.05)
