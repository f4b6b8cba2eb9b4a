"""Train a small net, plain or nested, on CIFAR-10 or other small images.

    python train_cifar10.py --net vit_small --n_epochs 400
    python train_cifar10.py --mrl_flag --net vitfixedposdualpatchnorm --mrl_dims 8,16,32,64,128

The flags are those of vision-transformers-cifar10 and matryoshka-vit-compression, see
docs/coming_from_vit_cifar.md; every option of train_imagenet.py is accepted as well. `--help` lists
the flags, `--help-all` all options. The model of the best epoch is
runs/<net>_lr<lr>_<dataset>/<run id>/model.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from matryoshka import config
from matryoshka.training.cifar_options import SECTIONS, parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

from matryoshka import distributed
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.distributed import World
from matryoshka.training.checks import check
from matryoshka.training.cifar import resolved
from matryoshka.training.cifar_images import SmallImages
from matryoshka.training.cifar_outputs import CifarOutputs
from matryoshka.training.run import claimed_run
from matryoshka.training.summary import accuracy_text, epoch_line
from matryoshka.training.supervised import SupervisedRun
from matryoshka.training.watch import Stopped


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    cfg, notes = resolved(parser().parse_args(argv))
    processes = distributed.processes_to_start(
        cfg.dist, cfg.training.distributed, cfg.training.device
    )
    check(cfg, processes)
    if processes > 1:
        return distributed.launch(processes, cfg.dist, str(Path(__file__).resolve()), argv)
    if cfg.training.distributed and not distributed.started_by_torchrun():
        notes.append(
            "note     --dp: one device, one process; --dist.world_size=2 --device cpu starts two"
        )
    with distributed.joined(cfg.training.device, cfg.dist.backend) as world:
        try:
            train(cfg, world, notes)
        except Stopped as stopped:
            return stopped.exit_code
    return 0


def train(cfg: SimpleNamespace, world: World, notes: Sequence[str] = ()) -> None:
    """Run the training to its end, from its first step or from its last checkpoint."""
    print0 = partial(print, flush=True) if world.is_main else lambda *_: None
    for note in notes:
        print0(note)
    images = SmallImages(cfg)
    with claimed_run(cfg, world, sections=SECTIONS, name=cfg.model.arch) as start:
        if start.finished:
            print0(f"finished {start.path}: this run is done; its model is {start.path / FINAL}")
            return
        run = SupervisedRun(
            cfg,
            world,
            print0,
            start,
            datasets=(images.train, images.validation),
            normalisation=images.normalisation,
            val_role=images.val_role,
        )
        print0(images.text)
        train_epochs(run, images)


def train_epochs(run: SupervisedRun, images: SmallImages) -> None:
    """Train, evaluate and save the best model."""
    cfg = run.cfg
    print0 = run.print0
    outputs = CifarOutputs(run) if run.world.is_main else None
    epochs = cfg.training.epochs
    with run.session(best_of_average=True, resume_hint="--resume") as session:
        if outputs is not None:
            outputs.start(session)
        while session.loop.epoch < epochs:
            with session.rollback():
                epoch = session.loop.epoch
                run.start_epoch(session)
                lr = run.lr(session)
                with run.meter(session) as meter:
                    for batch in meter:
                        lr = run.lr(session)
                        step_loss, norm, skipped = run.step(batch, lr)
                        reports = session.after_step(step_loss, norm, skipped)
                        meter.update(reports, lr)

                metrics = run.metrics(session.end_epoch(), meter, lr)
                if images.selects and (cfg.logging.log_level > 0 or epoch == epochs - 1):
                    metrics |= run.validation_metrics(session)
                run.progress.print0(epoch_line(epoch, metrics, run.dims, run.trained_prefixes))
                run.progress.announce(session.loop.step)
                session.log_epoch(metrics)
                if outputs is not None:
                    outputs.write_epoch(session, metrics)
                session.epoch_done(metrics)

        # ---- the best model, and the test set once ----
        model = run.best_model(session)
        results = {}
        for name, loader, text in images.evaluations(run):
            results[name] = run.evaluate(session, model=model, loader=loader)
            print0(f"{name:8} {accuracy_text(results[name].accuracy)}  ({text})")
        if outputs is not None:
            for line in outputs.write_final(session, model, results, images.chosen_on):
                print0(line)


if __name__ == "__main__":
    raise SystemExit(main())
