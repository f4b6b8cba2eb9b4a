"""A command line of every program that ends within a second or two, and the files that it reads."""

from __future__ import annotations

import contextlib
import io
import signal
from pathlib import Path

import numpy as np
from PIL import Image

from matryoshka import cli
from matryoshka.data import ImageFolder, write_beton

CLASSES = ("ant", "bee")
IMAGES = {"train": 16, "val": 4}  # of a class
SIDE = 16
SECONDS = 300  # of a command that should take two: a hang, on any machine
NET = [
    "--model.arch=vit",
    "--model.arch_options=dim=16,depth=1,heads=2,patch=4,image_size=8",
]
TRAINED = [
    *NET,
    "--model.mrl=1",
    "--model.dims=4,16",
    "--training.epochs=1",
    "--training.device=cpu",
    "--training.compile=0",
    "--data.num_workers=1",
    "--logging.tensorboard=0",
]
SIZES = [
    "--resolution.min_res=8",
    "--resolution.max_res=8",
    "--validation.resolution=8",
]


def write_inputs(root: Path) -> None:
    """Photos, .beton files, a model, predictions, embeddings and an index below `root`."""
    for split, count in IMAGES.items():
        for label, name in enumerate(CLASSES):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng(1000 * label + i)
                pixels = rng.integers(120 * label, 120 * label + 120, (SIDE, SIDE, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        source = ImageFolder(root / "photos" / split)
        write_beton(source, root / f"{split}.beton", max_resolution=SIDE, write_mode="raw")
    out = root / "inputs"
    run(command("train", root, out))
    (root / "model.safetensors").symlink_to(out / "run" / "model.safetensors")
    for name in ("eval", "embed", "index build"):
        run(command(name, root, out))


def run(argv: list[str]) -> int:
    """cli.main(argv), without its lines; the exit status."""
    with contextlib.redirect_stdout(io.StringIO()):
        return cli.main(argv)


def names() -> list[str]:
    """The commands that `command` knows."""
    return list(_commands(Path("root"), Path("out")))


def command(name: str, root: Path, out: Path) -> list[str]:
    """The words after `matryoshka`. root: of `write_inputs`. out: folder of the outputs."""
    return [*name.split(), *_commands(root, out)[name]]


def _commands(root: Path, out: Path) -> dict[str, list[str]]:
    train, val, model = root / "train.beton", root / "val.beton", root / "model.safetensors"
    inputs = root / "inputs"
    sets = [f"--data.train_dataset={train}", f"--data.val_dataset={val}"]
    run_folder = [f"--logging.folder={out}", "--logging.run_id=run"]
    return {
        "write": [
            f"--cfg.data_dir={root / 'photos/train'}",
            f"--cfg.write_path={out / 'a.beton'}",
            "--cfg.max_resolution=16",
        ],
        "data info": [str(train)],
        "data verify": [str(train)],
        "train": [*sets, *run_folder, *TRAINED, *SIZES],
        "cifar": [
            f"--cifar.data={train},{val}",
            *run_folder,
            *TRAINED,
            "--cifar.size=8",
            "--cifar.seed_outputs=0",
            "--cifar.val_share=0.2",
        ],
        "ssl": [
            *sets,
            *run_folder,
            *TRAINED,
            "--views.size=8",
            "--ssl.hidden=16",
            "--ssl.out=8",
            "--training.batch_size=8",
        ],
        "vqvae": [
            *sets,
            "--data.size=8",
            "--data.num_workers=1",
            "--model.codes=4",
            "--model.code_dim=4",
            "--model.hiddens=4",
            "--model.residual_hiddens=4",
            "--training.steps=2",
            "--training.batch_size=4",
            "--training.device=cpu",
            f"--output.path={out / 'vqvae.safetensors'}",
        ],
        "runs": [str(inputs)],
        "probe": [
            *sets,
            *run_folder,
            f"--model.path={model}",
            "--model.device=cpu",
            "--data.num_workers=1",
            "--probe.max_iter=5",
        ],
        "eval": [
            f"--path={model}",
            f"--data-root={val}",
            f"--output={out / 'results.json'}",
            "--save_logits",
            "--save_gt",
            "--workers=1",
            "--device=cpu",
        ],
        "dims": [
            f"--path={model}",
            f"--data-root={val}",
            f"--output={out / 'dims'}",
            "--map=pca",
            "--no-latency",
            "--workers=1",
            "--device=cpu",
        ],
        "embed": [
            f"--path={model}",
            f"--data={train}",
            f"--output={out / 'embeddings'}",
            "--workers=1",
            "--device=cpu",
        ],
        "adapt": [
            f"--embeddings={inputs / 'embeddings'}",
            f"--output={out / 'adapter'}",
            "--epochs=2",
            "--threads=1",
        ],
        "index build": [
            str(out / "photos.index"),
            f"--embeddings={(out if out == inputs else inputs) / 'embeddings'}",
            "--threads=1",
            "--map=none",
        ],
        "index info": [str(inputs / "photos.index"), "--threads=1"],
        "retrieve": [
            f"--database={inputs / 'embeddings'}",
            f"--queries={inputs / 'embeddings'}",
            f"--output={out / 'neighbours'}",
            "--k=5",
            "--at=2",
            "--no-speed",
            "--threads=1",
        ],
        "analyze": [
            f"--results={inputs / 'results.json'}",
            f"--output={out / 'analysis.json'}",
            "--splits=2",
            "--only=cascade,oracle,trends,calibration,agreement",
        ],
        "gradcam": [
            f"--path={model}",
            f"--data={val}",
            f"--output={out / 'maps'}",
            "--images=1",
            "--device=cpu",
        ],
        "baselines": [
            f"--path={model}",
            f"--train-data={train}",
            f"--val-data={val}",
            f"--output={out / 'baselines.json'}",
            "--only=1nn,ncm",
            "--shots=1",
            "--workers=1",
            "--device=cpu",
        ],
        "export": [
            f"--checkpoint={model}",
            f"--output_dir={out / 'exported'}",
            "--format=torchscript",
            "--no-latency",
            "--threads=1",
        ],
        "report": [
            str(inputs / "run"),
            f"--results={inputs / 'results.json'}",
            f"--output={out / 'report.html'}",
        ],
    }


def status(argv: list[str]) -> int | str | None:
    """cli.main(argv): its exit status. TimeoutError after SECONDS."""

    def stop(*_):
        raise TimeoutError(" ".join(argv)[:500])

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return cli.main(argv)
    except SystemExit as end:
        return end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
