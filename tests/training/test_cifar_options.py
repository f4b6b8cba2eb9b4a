"""The flags of train_cifar10.py stand for options in sections, with two sets of defaults."""

import itertools
import os
import threading
from pathlib import Path

import pytest

from matryoshka import config
from matryoshka.config import ConfigError
from matryoshka.models import model_spec
from matryoshka.training import cifar
from matryoshka.training.cifar_options import SECTIONS, parser

RECIPES = Path(__file__).resolve().parents[2] / "vit_configs"


def options(*argv):
    """The options of a command line that differ from those without flags."""
    plain, given = (config.flat(parser().parse_args(a)) for a in ([], argv))
    return {name: value for name, value in given.items() if value != plain[name]}


def test_the_defaults_are_those_of_vision_transformers_cifar10():
    cfg = parser().parse_args([])
    assert (cfg.model.arch, cfg.cifar.dataset, cfg.cifar.size) == ("vit", "cifar10", 32)
    t = cfg.training
    assert (t.epochs, t.batch_size, t.optimizer, t.weight_decay) == (200, 512, "adam", 0.0)
    assert (cfg.lr.lr, cfg.lr.lr_schedule_type) == (1e-4, "cosine")
    assert (cfg.data.crop, cfg.data.padding, cfg.data.flip) == ("padded", 4, 0.5)
    assert cfg.data.randaugment == pytest.approx(14 / 30 * 10)
    assert (cfg.data.mixup, t.label_smoothing, t.ema, cfg.lr.warmup_epochs) == (0, 0, 0, 0)
    assert (cfg.validation.resolution, cfg.validation.crop_ratio) == (32, 1.0)
    assert cfg.logging.folder == "runs/vit_lr0.0001_cifar10"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--lr 1e-3", {"lr.lr": 1e-3, "logging.folder": "runs/vit_lr0.001_cifar10"}),
        (
            "--lr.lr_per_256=0.1",
            {"lr.lr": None, "lr.lr_per_256": 0.1, "logging.folder": "runs/vit_lr0.1_cifar10"},
        ),
        ("--bs 128", {"training.global_batch_size": 128, "training.batch_size": 128}),
        ("--n_epochs 7", {"training.epochs": 7}),
        ("--patch 2", {"cifar.patch": 2}),
        ("--dimhead 64", {"cifar.dim": 64}),
        ("--embedding_dim 64", {"cifar.dim": 64}),
        ("--dimhead 64 --embedding_dim 64", {"cifar.dim": 64}),
        ("--convkernel 5", {"cifar.convkernel": 5}),
        ("--opt adamw", {"training.optimizer": "adamw", "training.weight_decay": 0.02}),
        ("--opt adan", {"training.optimizer": "adan", "training.weight_decay": 0.02}),
        ("--opt sgd", {"training.optimizer": "sgd", "training.momentum": 0.0}),
        ("--weight_decay .1", {"training.weight_decay": 0.1}),
        (
            "--opt adan --adan_beta2 .11",
            {
                "training.optimizer": "adan",
                "training.weight_decay": 0.02,
                "training.betas": [0.98, 0.89, 0.99],
            },
        ),
        ("--noaug", {"data.randaugment": 0.0}),
        ("--mixup", {"data.mixup": 1.0}),
        ("--noamp", {"training.precision": "fp32"}),
        ("--dp", {"training.distributed": 1}),
        ("--notb", {"logging.tensorboard": 0}),
        ("--nowandb", {"logging.wandb": "off"}),
        ("--resume", {"training.resume": "newest"}),
        ("-r", {"training.resume": "newest"}),
        ("--seed 3", {"training.seed": 3}),
        ("--device cpu", {"training.device": "cpu"}),
        ("--val_share 0", {"cifar.val_share": 0.0}),
        ("--select_on_test", {"cifar.select_on_test": 1}),
        ("--data a.beton,b.beton", {"cifar.data": ["a.beton", "b.beton"]}),
        ("--cache elsewhere", {"cifar.cache": "elsewhere"}),
        (
            "--dataset cifar100",
            {"cifar.dataset": "cifar100", "logging.folder": "runs/vit_lr0.0001_cifar100"},
        ),
        (
            "--size 48",
            {
                "cifar.size": 48,
                "resolution.min_res": 48,
                "resolution.max_res": 48,
                "validation.resolution": 48,
            },
        ),
        (
            "--net vitfixedpos",
            {
                "model.arch": "vitfixedpos",
                "cifar.net": "vitfixedpos",
                "training.epochs": 100,
                "logging.folder": "runs/vitfixedpos_lr0.0001_cifar10",
            },
        ),
        ("--training.ema=0.9 --data.cutmix 1", {"training.ema": 0.9, "data.cutmix": 1.0}),
    ],
)
def test_a_flag_changes_these_options(argv, expected):
    assert options(*argv.split()) == expected


@pytest.mark.parametrize(
    ("argv", "arch", "efficient", "name"),
    [
        ("", "vit_independent", 0, "vitfixedposdualpatchnorm"),
        ("--nested_proj_mrl", "vit_nested_proj", 0, "vitfixedposdualpatchnorm"),
        ("--mrl_kind nested_proj", "vit_nested_proj", 0, "vitfixedposdualpatchnorm"),
        ("--mrl_kind nested", "vit_nested", 1, "vitfixedposdualpatchnorm"),
        ("--mrl_kind prefixes", "vitfixedposdualpatchnorm", 0, "vitfixedposdualpatchnorm"),
        ("--mrl_kind shared --net res18", "res18", 1, "res18"),
        ("--net vit", "vit", 0, "vit"),
    ],
)
def test_mrl_flag_chooses_the_kind_of_nesting(argv, arch, efficient, name):
    given = options("--mrl_flag", "--mrl_dims", "8,16", *argv.split())
    assert given.get("model.arch", "vit") == arch
    assert given["cifar.net"] == name
    assert given["model.mrl"] == 1
    assert given.get("model.efficient", 0) == efficient
    assert given["model.dims"] == [8, 16]
    assert given["training.epochs"] == 100


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--mrl_dims 8,16", "--mrl_dims needs --mrl_flag"),
        ("--nested_proj_mrl", "--nested_proj_mrl needs --mrl_flag"),
        ("--mrl_flag --nested_proj_mrl --mrl_kind nested", "give one"),
        ("--mrl_flag --net res18 --mrl_kind nested", "use prefixes or shared"),
        ("--dimhead 8 --embedding_dim 16", "give one"),
        ("--opt adan --adan_beta1 0", "adan_beta1"),
        ("--opt adam --adan_beta1 .1", "--adan_beta1 needs --opt adan"),
        ("--select_on_test --val_share .2", "give one"),
        ("--opt lion", "expected one of adam"),
        ("--nett vit", "unknown option '--nett'"),
        ("--training.emma=1", "unknown option 'training.emma'"),
        ("--lr", "a value is missing"),
    ],
)
def test_flags_that_cannot_be_met_are_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as error:
        parser().parse_args(argv.split())
    assert "\n" not in str(error.value)


def test_files_flags_and_sections_win_in_this_order(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("training: {epochs: 3, seed: 5}\nlr: {lr: 0.5}\nmodel: {arch: vitfixedpos}\n")
    argv = ["--config-file", str(file), "--n_epochs", "4", "--lr", "0.1", "--lr.lr=0.2"]
    cfg = parser().parse_args(argv)
    assert (cfg.training.seed, cfg.training.epochs, cfg.lr.lr) == (5, 4, 0.2)
    # a net in a file also decides the defaults
    alone = parser().parse_args(["--config-file", str(file), "--training.label_smoothing=0"])
    assert alone.model.arch == "vitfixedpos"
    assert parser().parse_args(["--model.arch=vitfixedpos"]).training.epochs == 100


def test_printed_options_are_read_back(capsys, tmp_path):
    argv = ["--mrl_flag", "--mrl_kind", "nested", "--opt", "adan"]
    with pytest.raises(SystemExit, match=r"^0$"):
        parser().parse_args([*argv, "--print-config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parser().parse_args(["-C", str(file)]) == parser().parse_args(argv)


def test_sizes_reach_the_options_of_the_net(monkeypatch):
    monkeypatch.setattr(cifar, "_with_data", lambda cfg: cfg.data)

    def resolved(argv):
        cfg, lines = cifar.resolved(parser().parse_args([*argv.split(), "--nowandb"]))
        return cfg.model, lines

    model, lines = resolved("--patch 8 --dimhead 64 --size 48")
    assert set(model.arch_options) == {"image_size=48", "patch=8", "dim=64"}
    assert lines == ["defaults vision-transformers-cifar10: vit, 200 epochs"]
    model, lines = resolved("--net res18 --patch 8")
    assert model.arch_options == ("image_size=32",)
    assert lines[1] == "note     --patch 8: res18 has no such option"
    model, _ = resolved("--mrl_flag --mrl_kind nested --embedding_dim 48")
    assert model.dims == (8, 16, 32, 48)
    assert model.arch_options == ("image_size=32",)
    with pytest.raises(ConfigError, match="the widest of --mrl_dims is 16"):
        resolved("--mrl_flag --mrl_kind nested --mrl_dims 8,16 --embedding_dim 64")


def test_weights_and_biases_is_used_where_it_is_configured(monkeypatch):
    monkeypatch.setattr(cifar, "_with_data", lambda cfg: cfg.data)

    def logged(*argv):
        cfg, lines = cifar.resolved(parser().parse_args(argv))
        return cfg.logging.wandb, lines[1:]

    monkeypatch.setenv("NETRC", "/nonexistent")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    project, notes = logged()
    assert project is None
    assert "not configured" in notes[0]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged() == ("cifar10-challange", [])
    assert logged("--nowandb") == (None, [])
    assert logged("--logging.wandb=mine") == ("mine", [])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert logged()[0] is None
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # the old word for offline, which needs no key
    assert logged() == ("cifar10-challange", [])


def test_every_section_of_train_imagenet_is_accepted():
    names = {"model", "resolution", "data", "lr", "logging", "validation", "training", "dist"}
    assert set(SECTIONS) == {"cifar", *names}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_run(recipe, monkeypatch):
    """Its options are legal and it says what it gives and how it is run."""
    monkeypatch.setattr(cifar, "_with_data", lambda cfg: cfg.data)
    cfg, _ = cifar.resolved(parser().parse_args(["--config-file", str(recipe), "--nowandb"]))
    spec = model_spec(cfg.model, 10)
    assert spec.arch == cfg.model.arch
    lines = recipe.read_text().splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    assert head[1] == f"#   matryoshka cifar --config-file vit_configs/{recipe.name}"
    parts = [line.partition(":")[0] for line in head[2:] if not line.startswith("#   ")]
    assert parts == ["# Expected", "# Cost"]


def test_the_guide_lists_every_recipe():
    guide = (RECIPES.parent / "docs" / "small_images.md").read_text()
    assert [path.name for path in RECIPES.glob("*.yaml") if f"`{path.name}`" not in guide] == []


@pytest.mark.parametrize(
    ("words", "arch", "net", "dims", "efficient"),
    [
        ("-C {}/res18.yaml --mrl_flag", "res18", "res18", None, False),
        ("--model.arch=res18 --mrl_flag", "res18", "res18", None, False),
        ("-C {}/fast_cnn.yaml --mrl_dims 8,64", "fast_cnn", None, (8, 64), False),
        ("-C {}/fast_cnn.yaml --mrl_kind shared", "fast_cnn", "fast_cnn", None, True),
        (
            "-C {}/vit_nested.yaml --mrl_flag --mrl_dims 8,16",
            "vit_nested",
            "vitfixedposdualpatchnorm",
            (8, 16),
            True,
        ),
        ("-C {}/res18.yaml --net res34 --mrl_flag", "res34", "res34", None, False),
        ("--mrl_flag", "vit_independent", "vitfixedposdualpatchnorm", None, False),
    ],
)
def test_flags_of_mrl_keep_the_net_of_a_file(words, arch, net, dims, efficient):
    cfg = parser().parse_args(words.format(RECIPES).split())
    found = (cfg.model.arch, cfg.cifar.net, cfg.model.dims, cfg.model.efficient)
    assert found == (arch, net, dims, efficient)
    assert cfg.model.mrl


def test_dims_still_need_a_nested_net():
    with pytest.raises(ConfigError, match="--mrl_dims needs --mrl_flag"):
        parser().parse_args(["-C", str(RECIPES / "res18.yaml"), "--mrl_dims", "8,16"])


@pytest.mark.parametrize("words", [["--lr", "0.2"], ["--mrl_flag"]])
def test_a_config_file_may_be_a_pipe(words, tmp_path):
    """It can be read once only."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("model: {arch: res18}\n",))
    writer.start()
    cfg = parser().parse_args(["-C", str(pipe), *words])
    writer.join()
    assert cfg.model.arch == "res18"
