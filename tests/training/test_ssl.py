"""Runs of train_ssl.py: outputs, resume, evaluation, and the flags of two repositories."""

import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked_ranks import run_script
from matryoshka.train import train_ssl
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchrun_starts import free_ports

from matryoshka.checkpoint import load_model
from matryoshka.checkpoint.transfer import start_model
from matryoshka.config import ConfigError
from matryoshka.data import CenterCrop, Loader
from matryoshka.data.hugging_face import MissingPartError
from matryoshka.evaluation import self_supervised
from matryoshka.evaluation.predict import extract_features
from matryoshka.models import ModelConfig, ModelError
from matryoshka.ssl import METHODS
from matryoshka.training import snapshot, ssl_options, ssl_outputs, ssl_run, ssl_setup, ssl_step
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.watch import REQUEUE

ROOT = Path(__file__).resolve().parents[2]
DIMS = (8, 16, 32)
SMALL = [
    "--net=fast_cnn",
    "--model.arch_options=dim=32",
    "--batch-size=100",
    "--views.size=16",
    "--ssl.hidden=16",
    "--ssl.out=8",
    "--device=cpu",
    "--data.num_workers=1",
    "--logging.tensorboard=0",
    "--logging.run_id=run",
]


def command(digits, method, *more):
    data = [f"--data.train_dataset={digits['train']}", f"--data.val_dataset={digits['val']}"]
    options = {"moco": ["--ssl.queue=400"], "sigreg": ["--ssl.directions=16"]}
    return [*SMALL, *data, f"--method={method}", *options.get(method, []), *more]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ssl_outputs, "draw_chart", lambda *_: None)
    monkeypatch.setattr(ssl_run, "WATCHED", 64)


@pytest.fixture(scope="module")
def moco(digits, tmp_path_factory):
    """The folder of a finished run of MoCo."""
    folder = tmp_path_factory.mktemp("moco")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ssl_outputs, "draw_chart", lambda *_: None)
        patch.setattr(ssl_run, "WATCHED", 64)
        assert train_ssl.main(command(digits, "moco", "--epochs=2", "--validation.every=1")) == 0
    return folder / "ssl_runs" / "run"


def features_of(model, path):
    loader = Loader(str(path), 64, order="sequential", crop=CenterCrop(16, 1.0), num_workers=1)
    return extract_features(model, loader, len(loader.dataset))


# ---------------------------------------------------------------- what a run leaves


def test_the_numbers_are_those_of_the_saved_encoder(moco, digits):
    def weights(distance):
        return np.exp((1 - distance) / 0.07)

    model = load_model(moco / "model.safetensors")
    assert model.dims == DIMS
    known, known_labels = features_of(model, digits["train"])
    asked, labels = features_of(model, digits["val"])
    results = json.loads((moco / "results.json").read_text())
    for d in DIMS:
        unit = torch.nn.functional.normalize(known[:, :d], dim=1)
        queries = torch.nn.functional.normalize(asked[:, :d], dim=1)
        votes = KNeighborsClassifier(20, metric="cosine", weights=weights)
        votes.fit(unit, known_labels)
        accuracy = 100 * votes.score(queries, labels)
        assert results["knn"][str(d)]["20"] == pytest.approx(accuracy, abs=1.01)  # a near tie
        with torch.no_grad():
            answers = model.head(asked)[DIMS.index(d)].argmax(1)
        shown = 100 * float((answers == labels).double().mean())
        assert results["probe"][str(d)] == pytest.approx(shown, abs=1.01)
    lines = [json.loads(line) for line in (moco / "log").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        for name in (
            "knn20",
            "knn200",
            "knn20_top5",
            "map10",
            "probe",
            "std",
            "alignment",
            "uniformity",
            "rank",
        ):
            assert f"{name}/32" in line, name
    assert lines[1]["pflop"] == pytest.approx(2 * lines[0]["pflop"])
    assert lines[1]["knn20/32"] == pytest.approx(results["knn"]["32"]["20"])


def test_checkpoints_answer_like_the_run(moco):
    """Of any checkpoint, load_model opens the encoder, with the probe's classifiers."""
    final = load_model(moco / "model.safetensors").state_dict()
    last = load_model(moco / "checkpoints" / "last.safetensors").state_dict()
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert final["head.heads.2.weight"].abs().max() > 0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "moco"])
def test_every_method_trains(digits, method, monkeypatch):
    modes = []
    original = ssl_step.train_step

    def watched(*args, **kwargs):
        learner = kwargs["state"].model
        modes.append(all(m.training for m in learner.method.modules()))
        return original(*args, **kwargs)

    monkeypatch.setattr(ssl_run, "train_step", watched)
    argv = command(digits, method, "--epochs=2", "--validation.every=1")
    assert train_ssl.main(argv) == 0
    # Also after an evaluation: in the repository relic, batch norm stayed frozen.
    assert len(modes) == 8
    assert all(modes)
    run = Path("ssl_runs/run")
    lines = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    values = [value for line in lines for value in line.values()]
    assert np.isfinite([v for v in values if isinstance(v, float)]).all()
    assert load_model(run / "model.safetensors").dims == DIMS


@pytest.mark.parametrize("method", ["byol", "moco"])
def test_gradients_are_accumulated(digits, method):
    """The keys of every part of a step enter the queue."""
    more = ["--batch-size=50", "--training.global_batch_size=100", "--epochs=1"]
    assert train_ssl.main(command(digits, method, *more)) == 0
    checkpoint = snapshot.read(Path("ssl_runs/run/checkpoints/last.safetensors"))
    assert checkpoint.metadata["progress"]["step"] == 4
    if method == "moco":
        keys = checkpoint.tensors["model.method.queue.keys"]
        first = snapshot.read(Path("ssl_runs/run/checkpoints/step_0.safetensors"))
        before = first.tensors["model.method.queue.keys"]
        assert not (keys == before).any(), "400 keys have replaced all of the start"


def test_photos_without_classes(tmp_path, photo, capsys):
    (tmp_path / "photos").mkdir()
    for k in range(12):
        Image.fromarray(photo(50 + k, 40, seed=k)).save(tmp_path / "photos" / f"{k}.jpg")
    (tmp_path / "photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    argv = [*SMALL, "--data=photos", "--epochs=1", "--batch-size=6", "--method=simclr"]
    assert train_ssl.main([*argv, "--data.on_error=skip"]) == 0
    out = capsys.readouterr().out
    assert "1 images were left out of this epoch" in out
    assert "note     neighbours are not evaluated: the training images have no classes" in out
    results = json.loads((tmp_path / "ssl_runs/run/results.json").read_text())
    assert "knn" not in results
    assert set(results["rank"]) == {"8", "16", "32"}
    model = load_model("ssl_runs/run/model.safetensors")
    (tmp_path / "photos" / "torn.jpg").unlink()
    assert model.encode_files("photos", truncate_dim=8).shape == (12, 8)


def test_plain_training_is_one_prefix_and_small_views_work(digits, capsys):
    argv = command(
        digits, "relic", "--plain", "--views.small=2", "--views.small_size=9", "--epochs=1"
    )
    assert train_ssl.main(argv) == 0
    assert "prefixes [32]" in capsys.readouterr().out


def test_a_run_is_kept(moco, monkeypatch, tmp_path, capsys):
    """bench/ssl_runs.py: the run's numbers, and those of raw pixels beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import record
    import ssl_runs

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    argv = [str(moco), "--recipe", "moco", "--data", "digits", "--record", "--against", str(moco)]
    assert ssl_runs.main(argv) == 0
    out = capsys.readouterr().out
    assert "moco, " in out
    assert "against plain: +0.00 (+0.00 to +0.00)" in out
    votes = ssl_runs.right_votes(moco)
    (row,) = [json.loads(line) for line in (tmp_path / "ssl_runs.jsonl").read_text().splitlines()]
    results = json.loads((moco / "results.json").read_text())
    assert row["knn20"]["32"] == results["knn"]["32"]["20"]
    assert 100 * votes.mean() == pytest.approx(row["knn20"]["32"], abs=1.01), "a near tie"
    assert row["pixels"] > 50, "digits are easy"
    assert [line["epoch"] for line in row["curve"]] == [0, 1]


# ---------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("stop", [3, 4])
def test_a_stopped_run_resumes_to_the_same_weights(digits, moco, monkeypatch, capsys, stop):
    """Towers, queue, probe, schedules and order: step 4 is the last of the first epoch."""
    original, steps = NonFiniteGuard.before_step, []

    def at_step(self):
        steps.append(0)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    argv = command(digits, "moco", "--epochs=2", "--validation.every=1")
    monkeypatch.setattr(NonFiniteGuard, "before_step", at_step)
    assert train_ssl.main(argv) == REQUEUE
    assert "--training.resume=ssl_runs/run" in capsys.readouterr().out
    monkeypatch.setattr(NonFiniteGuard, "before_step", original)
    assert train_ssl.main([*argv, "--training.resume=ssl_runs/run"]) == 0
    ours, theirs = (
        folder.joinpath("checkpoints", "last.safetensors").read_bytes()
        for folder in (Path("ssl_runs/run"), moco)
    )
    assert ours[-50_000:] == theirs[-50_000:], "the state differs from an undisturbed run's"
    assert Path("ssl_runs/run/results.json").read_text() == (moco / "results.json").read_text()


def test_a_resumed_run_remembers_its_monitors(digits, monkeypatch, capsys):
    """A standard deviation of half of the best value is a fall, though none is in this process."""
    stds = iter([1.0, 0.4])
    before_step, steps = NonFiniteGuard.before_step, []

    def monitors(first, second, dims):
        std = next(stds)
        return {d: {"std": std, "alignment": 0.0, "uniformity": -2.0, "rank": 4.0} for d in dims}

    def at_step(self):
        steps.append(0)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return before_step(self)

    monkeypatch.setattr(self_supervised, "collapse_monitors", monitors)
    monkeypatch.setattr(NonFiniteGuard, "before_step", at_step)
    argv = command(digits, "sigreg", "--epochs=2", "--validation.every=1")
    assert train_ssl.main(argv) == REQUEUE
    assert "warning" not in capsys.readouterr().out
    assert train_ssl.main([*argv, "--training.resume=auto"]) == 0
    out = capsys.readouterr().out
    assert "warning  epoch 1: std of prefix 8 is 0.40, it has been 1.00" in out


RANKS = """
import json, os, signal, sys
from forked_ranks import as_ranks
import torch
from matryoshka.train import train_ssl
from matryoshka.evaluation import self_supervised
from matryoshka.training import ssl_outputs, ssl_run
from matryoshka.training.guard import NonFiniteGuard

ports, argv = json.loads(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
ssl_outputs.draw_chart = lambda *_: None
ssl_run.WATCHED = 64
before_step, hits = NonFiniteGuard.before_step, self_supervised.neighbour_hits
steps = []

def only_rank_1():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

def at_step(self):
    steps.append(0)
    if len(steps) == 2:
        only_rank_1()
    return before_step(self)

def in_evaluation(*args, **kwargs):
    only_rank_1()
    return hits(*args, **kwargs)

def run(*more):
    return lambda: train_ssl.main([*argv, *more])

assert as_ranks(run("--logging.run_id=whole"), 2, ports[0]) == [0, 0]
NonFiniteGuard.before_step = at_step
assert as_ranks(run(), 2, ports[1]) == [75, 75]
NonFiniteGuard.before_step = before_step
self_supervised.neighbour_hits = in_evaluation
assert as_ranks(run("--training.resume=auto"), 2, ports[2]) == [75, 75]
self_supervised.neighbour_hits = hits
assert as_ranks(run("--training.resume=auto"), 2, ports[3]) == [0, 0]
"""


@pytest.mark.parametrize(
    "words",
    [
        "--method=relic --ssl.learn_temperature=1",
        "--method=byol --batch-size=25 --training.global_batch_size=100",
    ],
)
def test_two_processes_stop_together_and_resume(digits, tmp_path, words):
    """A signal reaches one of them, inside an epoch and then in an evaluation: both stop, and end
    with the weights of an undisturbed run. Targets, a learned temperature, accumulated gradients.
    """
    argv = command(digits, words.split()[0].partition("=")[2], "--epochs=2", "--validation.every=1")
    argv += ["--batch-size=50", *words.split()[1:], f"--logging.folder={tmp_path}"]
    argv += ["--logging.relic_folder=" + str(tmp_path / "named")]
    out = run_script(RANKS, json.dumps(free_ports(4)), json.dumps(argv))
    assert "resume   after step 3, epoch 0" in out, out
    assert "resume   after step 4, epoch 0" in out, "trained, not evaluated"
    ours, theirs = (
        snapshot.read(tmp_path / run / "checkpoints" / "last.safetensors").tensors
        for run in ("run", "whole")
    )
    assert ours.keys() == theirs.keys()
    differ = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not differ
    results = [
        json.loads((tmp_path / run / "results.json").read_text()) for run in ("run", "whole")
    ]
    assert results[0] == results[1]


def test_another_method_cannot_resume(digits, moco, capsys):
    shutil.copytree(moco, "ssl_runs/run")
    argv = command(digits, "byol", "--epochs=2", "--training.resume=auto")
    assert "ssl.method was moco and is byol" in refused(argv, capsys)


# ---------------------------------------------------------------- two repositories


def small_flags():
    """SMALL without the flags of `matryoshka ssl` alone."""
    return [
        "--model.arch=fast_cnn",
        "--model.arch_options=dim=32",
        "--views.size=16",
        "--data.num_workers=1",
        "--training.device=cpu",
        "--logging.run_id=run",
    ]


def test_mrl_train(digits, tmp_path, capsys):
    data = tmp_path / "set"
    data.mkdir()
    for part in ("train", "val"):
        shutil.copy(digits[part], data / f"{part}.beton")
    argv = f"--dataset_path {digits['train']} -b 100 -lr 1e-3 -wd 1e-6 -save_model_dir out"
    argv = [*argv.split(), *small_flags(), "--num_epochs", "1", "--proj_out_dim", "8"]
    assert train_ssl.main([*argv, "--fp16_precision"], face="relic") == 0
    method = torch.load("out/relic_model.pth", weights_only=True)
    encoder = torch.load("out/encoder.pth", weights_only=True)
    model = load_model("ssl_runs/run/model.safetensors")
    for name, weight in model.trunk.state_dict().items():
        assert torch.equal(weight, encoder[name])
        assert torch.equal(weight, method[f"target.tower.encoder.trunk.{name}"])
    assert method["online.projector.second.weight"].shape == (8, 32)
    params = json.loads(Path("ssl_runs/run/params.json").read_text())
    assert params["ssl.projector"] == "mrl-e"
    assert params["training.optimizer"] == "adam"
    assert params["lr.lr"] == 1e-3
    assert "temperature" in Path("ssl_runs/run/log").read_text()
    # Both files are a start: of relic_model.pth, the target.
    for name in ("encoder.pth", "relic_model.pth"):
        config = ModelConfig(arch="fast_cnn", init=f"out/{name}")
        started, notes = start_model(config, model.spec)
        assert f"trunk from out/{name}" in notes[0]
        assert all(torch.equal(w, encoder[n]) for n, w in started.trunk.state_dict().items())
    with pytest.raises(ModelError, match="no classifier"):
        start_model(
            ModelConfig(arch="resnet10", init="out/encoder.pth"),
            replace(model.spec, arch="resnet10", dims=(8, 512), arch_options=()),
        )


def test_the_flags_of_moco_matryoshka(digits, tmp_path):
    for part in ("train", "val"):
        shutil.copy(digits[part], tmp_path / f"{part}.beton")
    argv = "--batch-size 100 --epochs 1 --queue-size 200 --nesting-list 4,8,24 --temp 0.1"
    argv = [*argv.split(), *small_flags(), "--data", str(tmp_path), "--eval-interval", "1"]
    assert train_ssl.main([*argv, "--logging.tensorboard=1"], face="moco") == 0
    board = EventAccumulator("runs/run/tensorboard")
    board.Reload()
    tags = set(board.Tags()["scalars"])
    named = "KNN/top1_acc KNN/top5_acc Retrieval/mAP Loss/batch_total Loss/epoch_total"
    assert {*named.split(), "LR/learning_rate"} <= tags
    (total,) = board.Scalars("Loss/batch_total")
    prefixes = [board.Scalars(f"Loss/batch_dim_{dim}")[0] for dim in (4, 8, 24)]
    assert total.step == 0, "of 4 steps, the first is a tenth one"
    assert sum(loss.value for loss in prefixes) == pytest.approx(total.value, rel=1e-5)
    final = torch.load("checkpoints/final_model.pt", weights_only=True)
    best = torch.load("checkpoints/best_model.pt", weights_only=True)
    assert final["nesting_list"] == [4, 8, 24]
    assert best["epoch"] == 1
    assert final["model_q"]["neck.weight"].shape == (24, 32)
    assert set(final["model_q"]) == set(final["model_k"])
    model = load_model("runs/run/model.safetensors")
    assert model.dims == (4, 8, 24)
    assert model.width == 24


RECIPES = ROOT / "ssl_configs"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_run(recipe):
    """Its options are legal and it says what it gives and how it is run."""
    head = list(
        itertools.takewhile(lambda line: line.startswith("# "), recipe.read_text().splitlines())
    )
    words = head[1].removeprefix("#   ").split()
    faces = {"matryoshka": "ssl", "mrl_train": "relic", "python": "moco"}
    face = faces[words[0]]
    argv = words[2 if face != "relic" else 1 :]
    assert argv[:2] == ["--config-file", f"ssl_configs/{recipe.name}"]
    cfg = ssl_options.parser(face).parse_args(argv)
    assert len(ssl_setup.encoder_spec(cfg, 10).dims) > 1
    parts = [line.partition(":")[0] for line in head[2:] if not line.startswith("#   ")]
    assert parts == ["# Expected", "# Cost"]


# ---------------------------------------------------------------- mistakes


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        train_ssl.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


MISTAKES = [
    ("moco --ssl.queue=250", "ssl.queue=250: must be a multiple of the 100 keys of a step"),
    ("moco --ssl.queue=50", "must be a multiple of the 100 keys of a step, such as 100"),
    ("relic --dims=8,64", "model.dims"),
    ("relic --batch-size=1", "one in a process: batch norm and relic need two or more"),
    ("simclr --training.global_batch_size=200", "simclr compares all images of a batch"),
    ("simclr --views.small=2", "simclr compares two views"),
    ("relic --views.small=2", "fast_cnn does not accept images of 7 pixels"),
    ("byol --ssl.queue=100", "ssl.queue=100: is for moco, not byol"),
    ("vicreg --ssl.encoder=target", "vicreg has one tower"),
    ("relic --ssl.temperature=0.1,0.2", "2 values for 3 prefixes; give one, or 3"),
    ("relic --views.blur=1,0,1", "views.blur: 3 values for 2 views"),
    ("relic --views.blur_kernel=4", "expected an odd number of pixels"),
    ("relic --model.efficient=1", "give --ssl.projector=mrl-e"),
    ("relic --model.arch=vit_nested", "a family of widths"),
    ("relic --data.loader=ffcv", "gives one view"),
    ("relic --data.dataset=cifar10", "give one"),
    ("vicreg --ssl.temperature=0.1", "ssl.temperature=0.1: is for relic and moco and simclr"),
    ("simclr --ssl.predictor=1", "ssl.predictor=True: is for relic and moco and byol, not simclr"),
    ("relic --ssl.projector=mrl-e --ssl.layers=3", "ssl.layers"),
    (
        "byol --training.batch_size=33 --training.global_batch_size=100",
        "leaves a part of one image",
    ),
    ("relic --views.small_size=9", "needs views.small"),
    ("relic --ssl.least_temperature=0.1", "needs ssl.learn_temperature=1"),
]


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ("train val", ("train", "val", None)),
        ("train unlabeled test", ("unlabeled", "test", "train")),
        ("unlabeled test", ("unlabeled", "test", None)),
        ("train", ("train", None, None)),
        ("train plane", ("", None, None)),
    ],
)
def test_the_parts_of_a_folder(parts, found, tmp_path):
    for name in parts.split():
        (tmp_path / name).mkdir()
    wanted = tuple(None if name is None else tmp_path / name for name in found)
    assert ssl_setup._parts_of_folder(tmp_path) == wanted


def test_sets_of_relic_have_their_sizes():
    for name, size in (("cifar10", 32), ("stl10", 96), ("food101", 192), ("imagenet1k", 192)):
        cfg = ssl_options.parser("relic").parse_args(["--dataset_name", name])
        assert cfg.views.size == size


def test_a_mistyped_folder_downloads_nothing(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        train_ssl.main(["--dataset_path", "phots"], face="relic")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--dataset_path phots: no such folder or file" in line


def test_the_processes_of_moco_matryoshka():
    def asked(face, *words):
        cfg = ssl_options.parser(face).parse_args(words)
        return cfg.training.distributed, cfg.dist.world_size

    assert asked("moco") == (None, 0)
    assert asked("moco", "--num-gpus=2") == (True, 2)
    assert asked("moco-distributed") == (True, 0), "all GPUs or slices"
    assert asked("moco-distributed", "--num-gpus=1") == (False, 1)


def test_a_part_of_other_classes_is_noted(digits, tmp_path, photo):
    for folder, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.fromarray(photo(40, 40)).save(tmp_path / folder / name / "1.jpg")
    data = SimpleNamespace(
        dataset=str(tmp_path),
        train_dataset=str(tmp_path / "train"),
        val_dataset=str(tmp_path / "val"),
        bank_dataset=None,
    )
    images = ssl_setup.Images(SimpleNamespace(data=data))
    assert images.evaluation is None
    assert "its 2 classes are not the 2 of" in images.why_not
    data.dataset = None  # the user has named both
    with pytest.raises(ConfigError, match="its 2 classes are not"):
        ssl_setup.Images(SimpleNamespace(data=data))


def test_a_set_without_a_part_to_evaluate_on(monkeypatch):
    def named(name, split, cache, progress):
        if split == "test":
            raise MissingPartError(f"{name}: its splits are train")
        return Path("train.beton")

    monkeypatch.setattr(ssl_setup, "named_dataset", named)
    assert ssl_setup._parts("hf:someone/photos", "cache") == (Path("train.beton"), None, None)


@pytest.mark.parametrize(
    ("face", "words"),
    [
        ("relic", "--views.small=4"),
        ("relic", "--ssl.method=moco"),
        ("moco", "--ssl.method=byol"),
        ("ssl", "--lr.lr_schedule_type=cyclic"),
        ("moco", "--dim=512 --num-gpus=2 --backend=gloo --pretrained"),
    ],
)
def test_defaults_fit_the_given_options(face, words):
    cfg = ssl_options.parser(face).parse_args(words.split())
    ssl_setup._check_method(cfg)
    ssl_setup._check_model(cfg)


@pytest.mark.parametrize(("words", "text"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistakes_are_one_line(digits, words, text, capsys, tmp_path):
    method, *options = words.split()
    assert text in refused([*command(digits, method, "--epochs=1"), *options], capsys)
    assert not (tmp_path / "ssl_runs").exists()
