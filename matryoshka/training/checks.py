"""Check a training run's options before any process starts: a mistake is an error of one line."""

from __future__ import annotations

from types import SimpleNamespace

from matryoshka import config, devices, distributed
from matryoshka.checkpoint.transfer import check_start
from matryoshka.data import open_dataset
from matryoshka.data.sources import parts_in
from matryoshka.models import ModelSpec, model_spec
from matryoshka.training.loaders import check_classes, check_crops, check_loader, resolution_at
from matryoshka.training.options import GRAPHS


def requested_batch_size(cfg: SimpleNamespace, processes: int) -> int:
    """Images per optimizer step that the options ask for."""
    t = cfg.training
    return t.global_batch_size or t.batch_size * processes * t.accumulate


def global_batch_size(
    cfg: SimpleNamespace, processes: int, *, images: int, before: int | None = None
) -> int:
    """Images per optimizer step, at most the training set's.

    Only full batches are trained on: with a larger batch, an epoch would have no step. images: size
    of the training set. before: the resumed checkpoint's value, which takes precedence.
    """
    t = cfg.training
    if t.global_batch_size and before and before != min(t.global_batch_size, images):
        raise config.ConfigError(
            f"training.global_batch_size={t.global_batch_size}: the resumed run has "
            f"{before}; leave it out"
        )
    size = before or min(requested_batch_size(cfg, processes), images)
    if size < processes:
        raise config.ConfigError(
            f"global batches of {size} images are less than one for each of {processes} processes; "
            "give a larger training.global_batch_size, or fewer processes"
        )
    return size


def check(cfg: SimpleNamespace, processes: int) -> None:
    """ConfigError, or another error for the user, for options that cannot work together here."""
    training, data = cfg.training, cfg.data
    if training.eval_only and training.path is None:
        raise config.ConfigError(
            "training.eval_only=1 needs training.path, the checkpoint to evaluate"
        )
    needed = [("data.val_dataset", data.val_dataset)]
    if not training.eval_only:
        needed.append(("data.train_dataset", data.train_dataset))
    if missing := [name for name, value in needed if value is None]:
        are = "is" if len(missing) == 1 else "are"
        raise config.ConfigError(
            f"{' and '.join(missing)} {are} required: a .beton file or an image folder"
        )

    for name, value in needed:
        if parts := parts_in(value):
            raise config.ConfigError(
                f"{name}={value}: its folders {', '.join(parts)} are parts of a data set, not "
                f"classes; give one of them, such as {value}/{parts[0]}"
            )

    check_options(cfg)
    if training.eval_only:
        return

    # ---- training alone: the run, the data, the model ----
    if training.path is not None:
        raise config.ConfigError(
            "training.path is the checkpoint for training.eval_only=1; leave it out to train"
        )
    # Under torchrun the run id is torchrun's own, see session.launch_id.
    if (
        training.resume == "auto"
        and cfg.logging.run_id is None
        and not distributed.started_by_torchrun()
    ):
        raise config.ConfigError("training.resume=auto needs logging.run_id, the run to resume")
    train_set, val_set = open_dataset(data.train_dataset), open_dataset(data.val_dataset)
    spec = model_spec(cfg.model, train_set.num_classes, training.use_blurpool)
    if training.resume is None:  # a resumed run takes its weights from its checkpoint
        # Every image size of the run: a transformer may not accept it, which would otherwise end
        # the run in the epoch that first uses it.
        ramp = cfg.resolution
        epochs = {0, *range(ramp.start_ramp, ramp.end_ramp), ramp.start_ramp, ramp.end_ramp}
        sizes = {resolution_at(epoch, ramp) for epoch in epochs} | {cfg.validation.resolution}
        check_start(cfg.model, spec, train_set.classes, sizes=sorted(sizes))
    check_classes(train_set, val_set)
    check_mixing(cfg, spec)
    global_batch_size(cfg, processes, images=len(train_set))


def check_options(cfg: SimpleNamespace) -> None:
    """ConfigError for options that are wrong by themselves or for this machine: with any data."""
    check_crops(cfg)
    check_loader(cfg)
    check_device_options(cfg)


def check_device_options(cfg: SimpleNamespace) -> None:
    """ConfigError for options of `training` and `dist` that this machine's devices cannot meet."""
    training = cfg.training
    distributed.check(training.distributed, training.device)
    device = distributed.pick_device(training.device, distributed.local_rank())
    distributed.pick_backend(cfg.dist.backend, device)
    devices.pick_precision(training.precision, device)
    if training.sync_bn and device.type != "cuda":
        raise config.ConfigError(
            f"training.sync_bn=1 needs GPUs, the device is {device.type}; leave it out"
        )
    if training.compile == GRAPHS and device.type != "cuda":
        raise config.ConfigError(
            f"training.compile=graphs needs a GPU, the device is {device.type}; leave it out, or "
            "give training.compile=1"
        )
    if training.deterministic and training.compile not in (None, "0"):
        raise config.ConfigError(
            f"training.compile={training.compile} and training.deterministic=1: compiled code is "
            "not deterministic; leave one out"
        )


def check_mixing(cfg: SimpleNamespace, spec: ModelSpec) -> None:
    """ConfigError for mixing the images of a single class."""
    if spec.num_classes < 2 and (cfg.data.mixup or cfg.data.cutmix):
        raise config.ConfigError(
            "data.mixup and data.cutmix mix classes, the training set has only one"
        )
