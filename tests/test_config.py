"""config/: fastargs' syntax without the 14 defects of fastargs 1.2.0, files, messages, round trips,
ranges, flags.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace

import fastargs
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.config import (
    ConfigError,
    check_fields,
    check_name,
    command_parser,
    flat,
    flat_parser,
    neutral_options,
    option,
    program,
    read,
    to_yaml,
)
from matryoshka.config import files as room

ROOT = Path(__file__).resolve().parents[1]


def _positive(value: float) -> None:
    if value <= 0:
        raise ValueError("must be positive")


@dataclass(frozen=True)
class LR:
    lr: float | None = field(default=None, metadata={"help": "peak rate; wins over lr_per_256"})
    lr_per_256: float = field(
        default=0.1, metadata={"help": "rate per 256 images", "check": _positive}
    )
    lr_peak_epoch: int = field(default=2, metadata={"help": "epoch of the highest rate"})
    lr_schedule_type: str = field(
        default="cyclic", metadata={"choices": ("cyclic", "step", "constant")}
    )


@dataclass(frozen=True)
class Training:
    train_dataset: str = field(metadata={"help": "the training set"})
    epochs: int = field(
        default=30, metadata={"help": "passes over the set", "choices": (1, 3, 5, 10, 30)}
    )
    use_blurpool: bool = field(default=False, metadata={"help": "BlurPool in strided convolutions"})
    path: str | None = None
    dims: tuple[int, ...] | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    port: str = "12355"


SECTIONS = {"lr": LR, "training": Training}


def options(*argv: str) -> SimpleNamespace:
    return read(SECTIONS, ["--training.train_dataset=x", *argv])


def errors(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        options(*argv)
    return str(raised.value).splitlines()


@pytest.fixture
def file(tmp_path):
    """Writes a config file and returns its path."""

    def write(content: str | bytes, suffix: str = ".yaml") -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_defect_01_false_is_false():
    for word in ("False", "0", "no", "OFF", "false"):
        assert options(f"--training.use_blurpool={word}").training.use_blurpool is False


def test_defect_02_flag_of_a_file_survives(file):
    for word in ("True", "1", "yes", "ON", "true"):
        assert (
            options("-C", file(f"training: {{use_blurpool: {word}}}")).training.use_blurpool is True
        )


def test_defect_03_unknown_option_of_a_file_is_an_error(file):
    path = file("training:\n  epoch: 5\nlr: {lrr: 5}\nfoo: {bar: 1}\nempty:\n")
    assert errors("-C", path) == [
        f"unknown option 'training.epoch' in file {path} (did you mean 'training.epochs'?)",
        f"unknown option 'lr.lrr' in file {path} (did you mean 'lr.lr'?)",
        f"unknown option 'foo.bar' in file {path}",
        f"unknown option 'empty' in file {path}",
    ]


def test_defect_04_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("lr.lr", "9")
    monkeypatch.setenv("training.epochs", "ten")
    assert options("--lr.lr=5").lr.lr == 5
    assert options().training.epochs == 30


def test_defect_05_invalid_value_exits_with_2(capsys):
    main = program(lambda argv=None: read(SECTIONS, argv))
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["--training.epochs=ten", "--training.epoch=3"])
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: unknown option 'training.epoch'")
    assert rest == [
        "error: training.train_dataset is required: the training set",
        "error: training.epochs='ten' on the command line: expected int",
    ]


def test_defect_06_bad_default_is_named():
    section = make_dataclass(
        "S", [("rate", float, field(default=-1.0, metadata={"check": _positive}))]
    )
    with pytest.raises(ConfigError, match=r"^s\.rate=-1\.0 by default: must be positive$"):
        read({"s": section}, [])


def test_defect_07_empty_file_has_no_options(file):
    for content in ("", "\n\n", "# nothing\n", "---\n", "training:\nlr: {}\n"):
        assert options("-C", file(content)) == options()


def test_defect_08_malformed_json_is_not_read_as_yaml(file):
    path = file('{"lr": {"lr": 1},\n "training": {epochs: 5}}', ".json")
    assert errors("-C", path) == [
        f"{path}, line 2: Expecting property name enclosed in double quotes"
    ]
    good = file(
        '{"lr": {"lr": 1e-4}, "training.use_blurpool": true, "training.dims": [8, 16]}', ".json"
    )
    assert flat(options("-C", good))["lr.lr"] == 1e-4
    assert options("-C", good).training.dims == (8, 16)
    wrong = file('{"training.epochs": true, "lr.lr": false, "training.dims": {}}', ".json")
    assert len(errors("-C", wrong)) == 3


def test_defect_09_checks_see_typed_values(file):
    assert options("--training.epochs=5", "--lr.lr_per_256=1").training.epochs == 5
    assert errors("--lr.lr_per_256=-1") == [
        "lr.lr_per_256='-1' on the command line: must be positive"
    ]
    assert errors("-C", file("training: {epochs: 2}"))[0].endswith(
        ": expected one of 1, 3, 5, 10, 30"
    )


def test_defect_10_no_abbreviations():
    hint = "(did you mean 'lr.lr'?)"
    assert (
        errors("--lr.l=5", "--lr.l", "5")
        == [f"unknown option 'lr.l' on the command line {hint}"] * 2
    )
    assert errors("--config=x")[0].startswith("unknown option 'config' on the command line")


def test_defect_11_help_lists_every_option(capsys, monkeypatch):
    for flag, width in (("-h", 50), ("--help", 100)):
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit, match=r"^0$"):
            read(SECTIONS, ["--training.epochs=ten", flag], prog="train", description="Trains.")
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) < width, (
            f"columns of the help text on a terminal {width} wide"
        )
        for name, section in SECTIONS.items():
            assert all(f"--{name}.{option.name} " in out for option in fields(section))
    assert "the training set [str; required]" in out
    assert "[str; default cyclic; one of cyclic, step, constant]" in out
    assert "[int,... or none; default null]" in out


def test_defect_12_decorator_keeps_name_doc_and_self():
    @program
    def main(self, argv=None):
        """What it does."""
        return self, argv

    owner = type("Owner", (), {"main": main})()
    assert owner.main(argv=["a"]) == (owner, ["a"])
    assert (main.__name__, main.__doc__) == ("main", "What it does.")


def test_defect_13_missing_option_is_named_and_none_is_a_value(file):
    with pytest.raises(
        ConfigError, match=r"^training\.train_dataset is required: the training set$"
    ):
        read(SECTIONS, [])
    for none in ("", "none", "None", "null"):
        assert options("--lr.lr=1", f"--lr.lr={none}").lr.lr is None
    assert options("-C", file("lr: {lr: 1}"), "-C", file("lr: {lr: ~}")).lr.lr is None
    assert errors("-C", file("training.epochs:"))[0].endswith(".yaml: expected int")


def test_defect_14_plain_text_and_no_globals(capsys):
    before = fastargs.get_current_config()
    known = dict(before.entries)
    with pytest.raises(SystemExit):
        read(SECTIONS, ["-h"])
    assert options("--lr.lr=1") != options("--lr.lr=2")  # a second read of the same sections
    assert (fastargs.get_current_config(), before.entries) == (before, known)
    assert re.fullmatch(r"[\n -~]*", capsys.readouterr().out)


def test_precedence(file):
    one = file("lr: {lr: 1, lr_peak_epoch: 1}\ntraining.epochs: 1")
    two = file("lr: {lr: 2, lr_peak_epoch: 2}")
    got = options("--lr.lr=3", f"--config-file={one}", "--config-file", two, "--lr.lr_per_256", "7")
    assert (got.lr.lr, got.lr.lr_peak_epoch, got.training.epochs, got.lr.lr_per_256) == (3, 2, 1, 7)
    assert options("-C", file("lr: {lr: high}"), "--lr.lr=3", "--lr.lr", "-4").lr.lr == -4


def test_text_of_a_file_is_read_as_written(file):
    content = "lr: {lr: 1e-4, lr_per_256: 5}\ntraining: {port: 0123, path: 2026-11-23, epochs: 010}"
    got = flat(options("-C", file(content)))
    assert (got["lr.lr"], got["lr.lr_per_256"], type(got["lr.lr_per_256"])) == (1e-4, 5.0, float)
    assert [got[f"training.{name}"] for name in ("port", "path", "epochs")] == [
        "0123",
        "2026-11-23",
        10,
    ]
    path = file("\ufefftraining:\r\n  path: Šärka 猫.pt\r\n  epochs: 3\r\n")  # BOM, CRLF
    assert options("-C", path) == options("--training.path=Šärka 猫.pt", "--training.epochs=3")


WRONG = """training.epochs=1.5 int
training.epochs=true int
training.use_blurpool=2 bool
training.dims=8,x int,... or none
training.scale=1 float,float
training.scale=1,2,3 float,float
lr.lr=nan float or none
lr.lr=1e999 float or none
lr.lr_schedule_type=cylic one of cyclic, step, constant (did you mean 'cyclic'?)"""


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_wrong_types(line, file):
    argument, expected = line.split(" ", 1)
    option, value = argument.split("=")
    assert errors(f"--{argument}") == [
        f"{option}='{value}' on the command line: expected {expected}"
    ]
    assert errors("-C", file(f"{option}: '{value}'"))[0].endswith(f": expected {expected}")


def test_tuples(file):
    for text in ("8,12,512", "8, 12, 512", "[8, 12, 512]"):
        assert options(f"--training.dims={text}").training.dims == (8, 12, 512)
    assert options("-C", file("training:\n  dims:\n  - 8\n  - 12\n")).training.dims == (8, 12)
    assert options("--training.dims=[]").training.dims == ()


def test_all_errors_at_once(file):
    path = file("lr: {lr: fast}\ntraining: 3")
    found = errors("--epochs=5", "loose", "--lr.lr_peak_epoch", "-C", path, "-C", "none.yaml")
    assert found[:4] == [
        "unknown option 'epochs' on the command line (did you mean 'training.epochs'?)",
        "unexpected argument 'loose' on the command line",
        "lr.lr_peak_epoch on the command line: a value is missing",
        f"training='3' in file {path}: expected a section of options",
    ]
    assert found[4].startswith("config file 'none.yaml' was not found (tried ")
    assert found[4].count("none.yaml") in (3, 4)  # the root may be the current folder
    assert found[5:] == [f"lr.lr='fast' in file {path}: expected float or none"]


def test_error_of_a_whole_section_and_bug_of_a_section():
    def reject(self):
        raise ValueError("low is above high")

    with pytest.raises(ConfigError, match=r"^s: low is above high$"):
        read({"s": make_dataclass("S", [], namespace={"__post_init__": reject})}, [])
    with pytest.raises(TypeError, match="unsupported annotation"):
        read({"s": make_dataclass("S", [("x", list, None)])}, [])


def test_lookup_order(tmp_path, monkeypatch, file):
    package, here = tmp_path / "src" / "matryoshka", tmp_path / "here"
    places = [here, package.parent, package / "configs"]
    for epoch, place in enumerate(places):
        (place / "rn50").mkdir(parents=True)
        (place / "rn50" / "a.yaml").write_text(f"lr.lr_peak_epoch: {epoch}")
    (package.parent / "pyproject.toml").touch()
    monkeypatch.setattr(room, "_PACKAGE", package)
    monkeypatch.chdir(here)
    for epoch, place in enumerate(places):
        assert options("-C", "rn50/a.yaml").lr.lr_peak_epoch == epoch
        (place / "rn50" / "a.yaml").unlink()
    (package.parent / "rn50" / "a.yaml").touch()
    (
        package.parent / "pyproject.toml"
    ).unlink()  # an installed package: its parent is not the repository
    assert "was not found" in errors("-C", "rn50/a.yaml")[0]
    assert errors("-C", str(tmp_path / "x.yaml"))[0].count("x.yaml") == 2


@pytest.mark.parametrize(
    ("content", "suffix", "line", "reason"),
    [
        ("lr:\n  lr: 1\n lr_peak_epoch: 2\n", ".yaml", 3, "expected <block end>"),
        ("lr: {lr: 1\n", ".yaml", 2, "expected ',' or '}'"),
        ("lr: 1\n--- \nlr: 2", ".yaml", 2, "but found another document"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]", ".yaml", 2, "aliases"),
        ("- " * 9_000, ".yaml", 1, "nested too deeply"),
        (json.dumps({"x": ["y"] * 12_000}), ".yaml", 1, "more than 10000 values"),
        (json.dumps({str(i): 0 for i in range(12_000)}), ".json", 1, "more than 10000 values"),
        ('{"a":' * 100_000, ".json", 1, "nested too deeply"),
        ("[1, 2]", ".yaml", 1, "expected options, not ['1', '2']"),
        ("lr: {lr: 1}\n# \x00", ".yaml", 2, "special characters are not allowed"),
        (b"lr: {lr: 1}\n# \xff", ".yaml", 2, "not UTF-8 text"),
    ],
)
def test_hostile_and_broken_files(file, content, suffix, line, reason):
    (error,) = errors("-C", file(content, suffix))
    assert f"{suffix}, line {line}: " in error
    assert reason in error


def test_file_that_is_too_large_or_a_folder(file, tmp_path):
    assert "larger than 1048576 bytes" in errors("-C", file("#" * 2_000_000))[0]
    assert "Is a directory" in errors("-C", str(tmp_path))[0]


def test_duplicate_keys(file):
    for content in (
        "lr:\n  lr: 1\n  lr: 2\n",
        "lr: {lr: 1}\nlr.lr: 2\n",
        '{"lr.lr": 1, "lr.lr": 2}',
    ):
        path = file(content, ".json" if content.startswith("{") else ".yaml")
        assert errors("-C", path) == [f"duplicate key 'lr.lr' in file {path}"]
    assert "duplicate key 'lr' " in errors("-C", file("lr: {lr: 1}\nlr: {lr_peak_epoch: 2}"))[0]


FLOATS, INTS = st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers()).map(tuple)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
NOT_NONE = TEXT.filter(lambda text: text.strip().lower() not in ("none", "null", ""))
TYPES = {
    "int_": (int, st.integers()),
    "float_": (float, FLOATS),
    "str_": (str, TEXT),
    "bool_": (bool, st.booleans()),
    "ints": (tuple[int, ...], INTS),
    "pair": (tuple[float, float], st.tuples(FLOATS, FLOATS)),
    "strs": (tuple[str, ...], st.lists(TEXT).map(tuple)),
    "maybe_ints": (tuple[int, ...] | None, st.none() | INTS),
    "maybe_str": (str | None, st.none() | NOT_NONE),
}
Every = make_dataclass("Every", [(name, kind) for name, (kind, _) in TYPES.items()], frozen=True)


@settings(max_examples=40)
@given(st.fixed_dictionaries({name: values for name, (_, values) in TYPES.items()}))
def test_yaml_round_trip(tmp_path_factory, values):
    config = SimpleNamespace(every=Every(**values))
    text = to_yaml(config, {"every.str_": "in file a\nb"})
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_bytes(text.encode())
    assert read({"every": Every}, ["-C", str(path)]) == config
    assert yaml.safe_load(text)["every"]["str_"] == values["str_"]  # other readers see the same


def test_flat_is_upstreams_format():
    got = flat(options("--training.dims=8,16", "--training.use_blurpool=1"))
    assert list(got) == [
        f"{name}.{option.name}" for name in SECTIONS for option in fields(SECTIONS[name])
    ]
    assert json.dumps([got["training.dims"], got["training.use_blurpool"]]) == "[[8, 16], 1]"


def test_print_config_round_trip(file, capsys):
    argv = ["--training.dims=8,16", "-C", file("lr: {lr: 1e-5}"), "--training.path=a: #b"]
    with pytest.raises(SystemExit, match=r"^0$"):
        options(*argv, "--print-config")
    out = capsys.readouterr().out
    assert options("-C", file(out)) == options(*argv)
    assert f"  lr: 1.0e-05  # in file {argv[2]}\n" in out
    assert "  dims: [8, 16]  # on the command line\n" in out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a\nb"), 2, "error: a\nerror: b\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            2,
            "error: x: No such file or directory\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ValueError("bug"), None, ""),
        (OSError("no file"), None, ""),
    ],
)
def test_program(error, code, message, capsys, monkeypatch):
    @program
    def main():
        raise error

    with pytest.raises(SystemExit if code else type(error)) as raised:
        main()
    assert (getattr(raised.value, "code", None), capsys.readouterr().err) == (code, message)
    monkeypatch.setenv("MATRYOSHKA_TRACEBACK", "1")
    with pytest.raises(SystemExit if code == 130 else type(error)):
        main()


def test_program_ends_as_it_should_when_its_reader_goes_away():
    code = "from matryoshka.config import program\nprogram(lambda: print('x' * 10**6))()"
    with Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, cwd=ROOT) as child:
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == (b"", 0)


# ---------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Limits:
    clip: float = option(0.0, help="largest norm", low=0)
    ema: float = option(0.0, low=0, high=1, affects_result=False)
    learn: float = option(0.2, above=0, below=1)
    recall: float | None = option(None, above=0, high=1)
    decays: tuple[float, ...] = option((1e-4,), low=0, nonempty=True)
    only: tuple[str, ...] = option(("ncm",), choices=("svd-1nn", "ncm"))
    run_id: str | None = option(None, check=check_name)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("clip=-1", "s.clip=-1: expected 0 or more"),
        ("ema=2", "s.ema=2: expected 0 to 1"),
        ("learn=0", "s.learn=0: expected more than 0, less than 1"),
        ("recall=0", "s.recall=0: expected more than 0, at most 1"),
        ("decays=1,-1", "s.decays=[1.0, -1.0]: expected 0 or more"),
        ("decays=", "s.decays=[]: expected one or more values, each 0 or more"),
        ("only=ncm,svd-1n", "'svd-1n' is unknown; known: svd-1nn, ncm (did you mean 'svd-1nn'?)"),
        ("run_id=../x", "no / or \\, no leading dot"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(argument, message, file):
    with pytest.raises(ConfigError) as raised:
        read({"s": Limits}, [f"--s.{argument}"])
    (line,) = str(raised.value).splitlines()
    assert message in line
    name, _, value = argument.partition("=")
    path = file(json.dumps({f"s.{name}": value}), ".json")
    with pytest.raises(ConfigError, match=f"in file {re.escape(path)}: "):
        read({"s": Limits}, ["-C", path])


def test_ranges_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        read({"s": Limits}, ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "largest norm [float; default 0.0; 0 or more]" in out
    assert "[float; default 0.2; more than 0, less than 1]" in out


def test_objects_made_in_python_are_checked_too():
    check_fields(Limits())
    with pytest.raises(ValueError, match=r"^s\.ema=2: expected 0 to 1$"):
        check_fields(Limits(ema=2), "s")


def test_options_that_do_not_affect_the_result():
    assert neutral_options({"s": Limits}) == {"s.ema"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "/a", "a\\b", "a\0b", "a\nb", "x" * 201, "é" * 101]
)
def test_a_name_that_would_leave_its_folder(name):
    with pytest.raises(ValueError, match="no leading dot"):
        check_name(name)


def test_names_of_files():
    for name in ("a", "run 1", "Šärka", "2026-11-29_10-00", "x" * 200):
        check_name(name)


# ---------------------------------------------------------------- flags


@dataclass(frozen=True, kw_only=True)
class Weights:
    path: str = option(help="the checkpoint")
    mrl: bool = option(False, help="with MRL")
    rep_size: int | None = option(None, flag="--rep_size", low=1)


@dataclass(frozen=True, kw_only=True)
class Work:
    batch_size: int = option(256, help="images", low=1)
    device: str = option("auto", choices=("auto", "cpu"))
    dims: tuple[int, ...] | None = option(None, low=1, nonempty=True)
    results: tuple[str, ...] = option((), words=True)
    data: tuple[str, ...] | None = option(None, repeat=True)
    names_from: Path | None = option(None)


@dataclass(frozen=True, kw_only=True)
class Place:
    index: str = option(help="the index", metavar="DIR", positional=True)
    names: tuple[str, ...] = option((), metavar="NAME", positional=True)


FLAGS = flat_parser("eval.py", "Evaluates.", Weights, Work)
PLACES = flat_parser("index.py", "Deletes.", Place, Work)


def test_flags_are_the_papers():
    args = FLAGS.parse_args(
        [
            *("--path", "a b", "--mrl", "--rep_size=8", "--batch-size", "2", "--dims", "8,16"),
            *("--results", "x", "y,z", "--data", "p", "--data=q", "--names-from", "n.txt"),
        ]
    )
    assert (args.path, args.mrl, args.rep_size, args.batch_size) == ("a b", True, 8, 2)
    assert (args.dims, args.results, args.data) == ((8, 16), ("x", "y,z"), ("p", "q"))
    assert args.names_from == Path("n.txt")
    defaults = vars(FLAGS.parse_args(["--path=a"]))
    assert defaults == {
        "path": "a",
        "mrl": False,
        "rep_size": None,
        "batch_size": 256,
        "device": "auto",
        "dims": None,
        "results": (),
        "data": None,
        "names_from": None,
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pth", "x"], "unknown option '--pth' (did you mean '--path'?)"),
        (["--path=x", "--rep-size=1"], "unknown option '--rep-size' (did you mean '--rep_size'?)"),
        (["--pat=x"], "unknown option '--pat' (did you mean '--path'?)"),  # no abbreviations
        ([], "--path is required: the checkpoint"),
        (["--path"], "--path: a value is missing"),
        (["--path=x", "--mrl=1"], "--mrl is a switch: it takes no value"),
        (["--path=x", "--batch-size=0"], "--batch-size 0: expected 1 or more"),
        (["--path=x", "--batch-size", "-1"], "--batch-size -1: expected 1 or more"),
        (["--path=x", "--batch-size=two"], "--batch-size two: expected int"),
        (["--path=x", "--dims=8,x"], "--dims 8,x: expected int,..."),
        (["--path=x", "--dims=8,0"], "--dims 8,0: expected 1 or more"),
        (["--path=x", "--device=cup"], "--device cup: expected one of auto, cpu"),
        (["--path=x", "loose"], "unexpected argument 'loose'"),
        (["--path=x", "--rep_size=\x1b[2J"], "--rep_size '\\x1b[2J': expected int"),
        (["--path=x", "--rep_size=none"], "--rep_size none: expected int"),
        (["--path=x", "--dims="], "--dims '': expected one or more values, each 1 or more"),
    ],
)
def test_a_mistake_in_flags_is_one_line(argv, message, capsys):
    main = program(FLAGS.parse_args)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(argv)
    out = capsys.readouterr()
    (line,) = out.err.splitlines()
    assert line.startswith(f"error: {message}")
    assert out.out == ""


def test_positional_arguments():
    args = PLACES.parse_args(["--batch-size", "2", "d", "--device=cpu", "a,b", "--", "--c"])
    assert (args.index, args.names, args.batch_size) == ("d", ("a,b", "--c"), 2)
    assert PLACES.parse_args(["d", "-1"]).names == ("-1",)
    with pytest.raises(ConfigError, match=r"^DIR is required: the index$"):
        PLACES.parse_args([])


def test_help_of_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match=r"^0$"):
        PLACES.parse_args(["-h"])
    out = capsys.readouterr().out
    assert out.startswith("usage: index.py DIR NAME ... [options]\n\nDeletes.\n")
    assert "images [default 256; 1 or more]" in out
    assert "[default auto; one of auto, cpu]" in out


def test_subcommands(capsys):
    parser = command_parser(
        "index.py", "An index.", "action", {"build": ("Builds.", [Place]), "info": ("", [Weights])}
    )
    args = parser.parse_args(["build", "d"])
    assert vars(args) == {"index": "d", "names": (), "action": "build"}
    for argv, message in (
        ([], "action is required: one of build, info"),
        (["buld"], "action 'buld': expected one of build, info (did you mean 'build'?)"),
        (["info", "--pth=x"], "unknown option '--pth' (did you mean '--path'?)"),
    ):
        with pytest.raises(ConfigError) as raised:
            parser.parse_args(argv)
        assert str(raised.value) == message
    with pytest.raises(SystemExit, match=r"^0$"):
        parser.parse_args(["--help"])
    assert "build" in capsys.readouterr().out


def test_an_option_declared_twice_is_a_bug():
    with pytest.raises(TypeError, match="path is declared twice"):
        flat_parser("x", "", Weights, Weights)


# ---------------------------------------------------------------- recipes

RAMPS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}


@pytest.mark.parametrize(
    ("depth", "rate", "batch", "wd"), [(18, 0.125, 1024, 5e-5), (50, 0.10625, 512, 1e-4)]
)
@pytest.mark.parametrize("epochs", RAMPS)
def test_recipes(depth, rate, batch, wd, epochs):
    path = ROOT / f"rn{depth}_configs" / f"rn{depth}_{epochs}_epochs.yaml"
    start, end = RAMPS[epochs]
    assert yaml.safe_load(path.read_text()) == {
        "lr": {"lr_per_256": rate},
        "model": {"arch": f"resnet{depth}"},
        "resolution": {"min_res": 160, "max_res": 192, "start_ramp": start, "end_ramp": end},
        "training": {
            "batch_size": batch,
            "epochs": epochs,
            "use_blurpool": True,
            "weight_decay": wd,
        },
        "validation": {"lr_tta": True, "resolution": 256},
    }
    assert f"--config-file {path.relative_to(ROOT)}" in path.read_text()
