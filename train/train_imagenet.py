"""Train a nested (MRL, MRL-E) or fixed-feature model on two .beton files or image folders.

    python train_imagenet.py --config-file rn50_configs/rn50_40_epochs.yaml --model.mrl=1 \\
        --data.train_dataset=train_500_0.50_90.ffcv --data.val_dataset=val_500_uncompressed.ffcv

Several GPUs: --training.distributed=1, or torchrun. All outputs are in <logging.folder>/<run id>/;
the model is model.safetensors. --training.resume=auto resumes a stopped run. `--help` lists all
options.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from matryoshka import config
from matryoshka.training.options import SECTIONS, parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import torch

from matryoshka import checkpoint, devices, distributed
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.distributed import World
from matryoshka.evaluation.evaluate import evaluate
from matryoshka.nested import nested_cross_entropy
from matryoshka.training.checks import check
from matryoshka.training.loaders import validation_loader
from matryoshka.training.run import claimed_run
from matryoshka.training.run_folder import draw_chart
from matryoshka.training.summary import accuracy_text, epoch_line
from matryoshka.training.supervised import SupervisedRun
from matryoshka.training.watch import Stopped


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    cfg = parser().parse_args(argv)
    processes = distributed.processes_to_start(
        cfg.dist, cfg.training.distributed, cfg.training.device
    )
    check(cfg, processes)
    if processes > 1:
        return distributed.launch(processes, cfg.dist, str(Path(__file__).resolve()), argv)
    with distributed.joined(cfg.training.device, cfg.dist.backend) as world:
        try:
            if cfg.training.eval_only:
                evaluate_checkpoint(cfg, world)
            else:
                train(cfg, world)
        except Stopped as stopped:
            return stopped.exit_code
    return 0


def train(cfg: SimpleNamespace, world: World, *, loss: Callable = nested_cross_entropy) -> None:
    """Run the training to its end, from its first step or from its last checkpoint.

    loss: has the signature of nested_cross_entropy.
    """
    print0 = partial(print, flush=True) if world.is_main else lambda *_: None
    with claimed_run(cfg, world, sections=SECTIONS, name=cfg.model.arch) as start:
        if start.finished:
            print0(f"finished {start.path}: this run is done; its model is {start.path / FINAL}")
            return
        train_epochs(SupervisedRun(cfg, world, print0, start, loss=loss))


def train_epochs(run: SupervisedRun) -> None:
    """Train, evaluate and save the model."""
    cfg = run.cfg
    print0 = run.print0
    folder = run.start.path
    epochs = cfg.training.epochs
    mirrored = cfg.validation.lr_tta
    with run.session() as session:
        # The session counts the epochs: a rollback sets the counter back.
        while session.loop.epoch < epochs:
            with session.rollback():  # ends here if the session returns to an older checkpoint
                epoch = session.loop.epoch
                run.start_epoch(session)
                # Logged if a resumed epoch has no steps left, only its evaluation.
                lr = run.lr(session)
                with run.meter(session) as meter:
                    for batch in meter:
                        lr = run.lr(session)
                        step_loss, norm, skipped = run.step(batch, lr)
                        reports = session.after_step(step_loss, norm, skipped)
                        meter.update(reports, lr)

                metrics = run.metrics(session.end_epoch(), meter, lr)
                if cfg.logging.log_level > 0 or epoch == epochs - 1:
                    metrics |= run.validation_metrics(session, tta=mirrored)
                run.progress.print0(epoch_line(epoch, metrics, run.dims, run.trained_prefixes))
                run.progress.announce(session.loop.step)
                session.log_epoch(metrics)
                session.epoch_done(metrics)

        # ---- final model ----
        # One view, as `matryoshka eval` measures; validation.lr_tta adds the mirror images.
        accuracy = run.evaluate(session).accuracy
        print0(f"accuracy {accuracy_text(accuracy)}  (one view, as matryoshka eval prints)")
        if mirrored:
            accuracy = run.evaluate(session, tta=True).accuracy
            print0(f"mirrored {accuracy_text(accuracy)}  (with mirror images, validation.lr_tta=1)")
        if run.world.is_main:
            # the last checkpoint must be complete before the run is finished
            session.snapshots.wait()
            checkpoint.save_upstream(run.model, folder / "final_weights.pt")
            if run.ema is not None:
                average = folder / "model_ema.safetensors"
                checkpoint.save_model(run.ema.module, average, run.options)
            # Last, because this file marks the run as finished.
            checkpoint.save_model(run.model, folder / FINAL, run.options)
            draw_chart(folder, print0)
            print0(f"model    {folder / FINAL}")


def evaluate_checkpoint(cfg: SimpleNamespace, world: World) -> None:
    """training.eval_only: print the accuracy of every prefix of training.path."""
    model = checkpoint.load_model(cfg.training.path)
    model = model.to(world.device).to(memory_format=torch.channels_last)
    loader = validation_loader(cfg, world)
    model.check_classes(loader.dataset)

    result = evaluate(
        model,
        loader,
        precision=devices.pick_precision(cfg.training.precision, world.device),
        tta=cfg.validation.lr_tta,
        world=world,
    )
    if world.is_main:
        for dim, values in result.accuracy.items():
            print(f"{dim:6d}  top-1 {values['top1']:6.2f}  top-5 {values['top5']:6.2f}")
        print(f"{len(loader.dataset):,} images in {result.seconds:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
