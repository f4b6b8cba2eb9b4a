"""Train an encoder without labels whose every prefix is a good embedding.

    python train_ssl.py --data cifar10 --method relic
    python train_ssl.py --data photos/ --method moco --net resnet50 --epochs 100

Methods: relic, moco, simclr, byol, vicreg, sigreg. The encoder is <logging.folder>/<run
id>/model.safetensors. `mrl_train`, train.py and train_distributed.py are this program with the
flags of two repositories, see docs/coming_from_mrl_ssl.md. `--help` lists the flags, `--help-all`
all options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from matryoshka import config
from matryoshka.training.ssl_options import SECTIONS, parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

from matryoshka import distributed
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.distributed import World
from matryoshka.training.run import claimed_run
from matryoshka.training.ssl_outputs import SslOutputs
from matryoshka.training.ssl_run import SslRun
from matryoshka.training.ssl_setup import Images, check, resolved
from matryoshka.training.summary import ssl_epoch_line
from matryoshka.training.watch import Stopped


@config.program
def main(argv: Sequence[str] | None = None, face: str = "ssl") -> int:
    """face: whose flags and defaults the options have, see ssl_options.FACES."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cfg, notes = resolved(parser(face).parse_args(argv))
    processes = distributed.processes_to_start(
        cfg.dist, cfg.training.distributed, cfg.training.device
    )
    images = check(cfg, processes)
    if processes > 1:
        script = Path(__file__).with_name(FACE_FILES[face]).resolve()
        return distributed.launch(processes, cfg.dist, str(script), argv)
    with distributed.joined(cfg.training.device, cfg.dist.backend) as world:
        try:
            train(cfg, world, images, notes)
        except Stopped as stopped:
            return stopped.exit_code
    return 0


# The file that a face's processes run.
FACE_FILES = {
    "ssl": "train_ssl.py",
    "relic": "mrl_train.py",
    "moco": "train_distributed.py",
    "moco-distributed": "train_distributed.py",
}


def train(cfg: SimpleNamespace, world: World, images: Images, notes: Sequence[str] = ()) -> None:
    """Run the training to its end, from its first step or from its last checkpoint."""
    print0 = partial(print, flush=True) if world.is_main else lambda *_: None
    name = f"{cfg.ssl.method}-{cfg.model.arch}"
    with claimed_run(cfg, world, sections=SECTIONS, name=name) as start:
        if start.finished:
            print0(f"finished {start.path}: this run is done; its encoder is {start.path / FINAL}")
            return
        run = SslRun(cfg, world, print0, start, images=images)
        run.print_notes(notes)
        train_epochs(run)


def train_epochs(run: SslRun) -> None:
    """Train, evaluate and save the encoder."""
    print0 = run.print0
    outputs = SslOutputs(run) if run.world.is_main else None
    epochs = run.cfg.training.epochs
    metrics: dict[str, float] = {}
    with run.session() as session:
        while session.loop.epoch < epochs:
            with session.rollback():
                epoch = session.loop.epoch
                run.start_epoch(session)
                lr, momentum = run.lr(session), run.momentum(session)
                with run.meter(session) as meter:
                    for batch in meter:
                        lr, momentum = run.lr(session), run.momentum(session)
                        loss, norm, skipped, prefix_losses = run.step(batch, lr, momentum)
                        reports = session.after_step(
                            loss, norm, skipped, prefix_losses=prefix_losses
                        )
                        meter.update(reports, lr)
                        if outputs is not None:
                            outputs.write_steps(session, reports)

                metrics = run.metrics(session, meter, lr=lr, momentum=momentum)
                if run.is_evaluated(epoch):
                    metrics |= run.evaluation_metrics(session, last=epoch == epochs - 1)
                run.progress.print0(ssl_epoch_line(epoch, metrics, run.dims))
                run.progress.announce(session.loop.step)
                run.write_probe()
                session.log_epoch(metrics)
                if outputs is not None:
                    outputs.write_epoch(session, metrics)
                session.epoch_done(metrics)

        # ---- the final encoder ----
        if not metrics:  # resumed after the last epoch
            metrics = run.evaluation_metrics(session, last=True) | {"pflop": run.pflop(epochs)}
        model = run.final_model()
        if outputs is not None:
            for line in outputs.write_final(session, model, metrics):
                print0(line)


if __name__ == "__main__":
    raise SystemExit(main())
