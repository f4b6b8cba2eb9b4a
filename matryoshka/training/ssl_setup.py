"""Options of train_ssl.py that follow from others and from the data; checks before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from matryoshka import distributed
from matryoshka.checkpoint.transfer import check_start
from matryoshka.config import ConfigError
from matryoshka.data import RandomResizedCrop
from matryoshka.data.bars import Bars
from matryoshka.data.catalogue import HELD_OUT, HUGGING_FACE, SETS
from matryoshka.data.dataset import Dataset
from matryoshka.data.hugging_face import MissingPartError
from matryoshka.data.named import named_dataset, part_of
from matryoshka.data.resident import MAX_SIDE
from matryoshka.data.sources import PARTS, open_images
from matryoshka.data.views import ViewOptions
from matryoshka.environment import count_in
from matryoshka.models import FAMILIES, ModelSpec, model_spec, option_names
from matryoshka.models.resnets import RESNETS
from matryoshka.ssl.options import (
    ACCUMULATES,
    MULTI_CROP,
    WITH_TARGET,
    WITH_TEMPERATURE,
    SslConfig,
    ViewsConfig,
)
from matryoshka.training.checks import check_device_options, global_batch_size
from matryoshka.training.loaders import check_classes
from matryoshka.training.step import check_whole_batch

LARGE_SIZE = 224
SMALL_STEM_UP_TO = 64  # pixels of images for which a ResNet gets a 3x3 stem
SMALL_VIEW = 3 / 7  # side of a small view / side of a large one, as in ReLICv2 (96 and 224)
BLUR_SHARE = 0.1  # kernel of the blur / side of the view, as in SimCLR (appendix A)
TRIAL_CLASSES = 1  # a check of a model needs a number before the data are there


# Options of section `ssl` that only some methods have a use for.
USED_BY = {
    "version": ("moco",),
    "queue": ("moco",),
    "symmetric": ("moco",),
    "shuffle_bn": ("moco",),
    "bn_group": ("moco",),
    "alpha": ("relic",),
    "stop_gradient": ("relic",),
    "invariance": ("vicreg",),
    "variance": ("vicreg",),
    "covariance": ("vicreg",),
    "gaussian": ("sigreg",),
    "directions": ("sigreg",),
    "knots": ("sigreg",),
    "temperature": WITH_TEMPERATURE,
    **dict.fromkeys(
        ("predictor", "momentum", "momentum_end", "momentum_after", "momentum_every"), WITH_TARGET
    ),
}


class Images:
    """The opened data sets of a run.

    train: to learn from, its labels are ignored. evaluation: labelled images whose neighbours are
    looked for in `bank`, by default `train`; or None: why_not then says why, for the user.
    """

    def __init__(self, cfg: SimpleNamespace) -> None:
        self.train: Dataset = open_images([cfg.data.train_dataset])
        self.evaluation: Dataset | None = None
        self.why_not = ""
        self.bank: Dataset = self.train
        if cfg.data.bank_dataset is not None:
            self.bank = open_images([cfg.data.bank_dataset])
        if (self.bank.labels < 0).any() or self.bank.num_classes < 2:
            self.why_not = "the training images have no classes"
        elif cfg.data.val_dataset is None:
            self.why_not = "data.val_dataset is not given"
        else:
            evaluation = open_images([cfg.data.val_dataset])
            try:
                check_classes(self.bank, evaluation)
                self.evaluation = evaluation
            except ConfigError as error:
                # A part that the user did not name is not worth a refusal.
                if cfg.data.dataset is None:
                    raise
                self.why_not = str(error)

    @property
    def num_classes(self) -> int:
        """Of the classifiers that learn beside the run; 1 without classes."""
        return self.train.num_classes if self.has_classes else 1

    @property
    def has_classes(self) -> bool:
        return self.train.num_classes > 1 and bool((self.train.labels >= 0).any())


# ---------------------------------------------------------------- options


def resolved(cfg: SimpleNamespace) -> tuple[SimpleNamespace, list[str]]:
    """Options with everything filled in that follows from others, and notes for the user.

    Fetches and writes the data set if it is not in the cache. ConfigError or ModelError, one line,
    for options that cannot be met; those that need no data come first.
    """
    cfg = SimpleNamespace(**vars(cfg))
    _check_model(cfg)
    _check_method(cfg)
    check_device_options(cfg)
    cfg.data = _with_data(cfg)
    side = _common_side(open_images([cfg.data.train_dataset]))
    cfg.views = _with_sizes(cfg.views, side)
    cfg.model, notes = _with_net_options(cfg.model, cfg.views.size)
    validation = cfg.validation
    if not validation.resolution:
        validation = replace(validation, resolution=cfg.views.size)
    if not validation.crop_ratio:
        validation = replace(validation, crop_ratio=1.0 if side else 0.875)
    cfg.validation = validation
    return cfg, notes


def _check_model(cfg: SimpleNamespace) -> None:
    model = cfg.model
    if model.arch in FAMILIES:
        raise ConfigError(
            f"model.arch={model.arch}: a family of widths has no prefixes of one embedding; "
            "choose one encoder"
        )
    if model.efficient:
        raise ConfigError("model.efficient=1: is for classifiers; give --ssl.projector=mrl-e")
    if model.freeze:
        raise ConfigError(f"model.freeze={model.freeze}: matryoshka ssl trains the whole encoder")
    if model.fixed_feature and model.mrl:
        raise ConfigError(f"model.fixed_feature={model.fixed_feature}: needs model.mrl=0")
    spec = model_spec(model, TRIAL_CLASSES)
    given = len(cfg.ssl.temperature)
    if given not in (1, len(spec.dims)):
        raise ConfigError(
            f"ssl.temperature: {given} values for {len(spec.dims)} prefixes; give one, or "
            f"{len(spec.dims)}"
        )


def _check_method(cfg: SimpleNamespace) -> None:
    """ConfigError for options that the method has no use for."""
    ssl, views = cfg.ssl, cfg.views
    if ssl.method not in MULTI_CROP and (views.small or views.count > 2):
        raise ConfigError(
            f"views.count={views.count}, views.small={views.small}: {ssl.method} compares two "
            "views; leave them out"
        )
    if ssl.method in ("relic", "moco") and views.count > 2:
        raise ConfigError(
            f"views.count={views.count}: {ssl.method} has two large views; add small ones "
            "(views.small)"
        )
    for name, methods in USED_BY.items():
        value = getattr(ssl, name)
        if ssl.method not in methods and value != getattr(SslConfig, name):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ConfigError(
                f"ssl.{name}={shown}: is for {' and '.join(methods)}, not {ssl.method}"
            )
    for name in ("layers", "norm"):
        if ssl.projector != "mrl" and getattr(ssl, name) != getattr(SslConfig, name):
            raise ConfigError(
                f"ssl.{name}={getattr(ssl, name)}: is for ssl.projector=mrl, not {ssl.projector}"
            )
    if ssl.learn_temperature and len(ssl.temperature) > 1:
        raise ConfigError("ssl.learn_temperature=1: learns one; give one ssl.temperature")
    if not ssl.learn_temperature and ssl.least_temperature != SslConfig.least_temperature:
        raise ConfigError(
            f"ssl.least_temperature={ssl.least_temperature:g}: needs ssl.learn_temperature=1"
        )
    for name in ("small_size", "small_scale"):
        if not views.small and getattr(views, name) != getattr(ViewsConfig, name):
            raise ConfigError(f"views.{name}: needs views.small, the number of small views")
    if ssl.method == "moco" and ssl.version == 3 and ssl.queue != SslConfig.queue:
        raise ConfigError(f"ssl.queue={ssl.queue}: version 3 has no queue; leave it out")
    if ssl.stop_gradient == "columns" and views.small:
        raise ConfigError("ssl.stop_gradient=columns: two views alone; leave out views.small")
    if cfg.data.loader != "native":
        raise ConfigError(f"data.loader={cfg.data.loader}: gives one view; use native")


def _with_data(cfg: SimpleNamespace) -> Any:
    """Section `data` with the paths of the sets to train and to evaluate on."""
    data = cfg.data
    given = (data.train_dataset, data.val_dataset)
    if data.dataset is None:
        if data.train_dataset is None:
            raise ConfigError(
                "no images: give --data (a name, a folder or a .beton), or data.train_dataset"
            )
        return data
    if any(path is not None for path in given):
        raise ConfigError(
            f"data.dataset={data.dataset} and data.train_dataset or data.val_dataset: give one"
        )
    train, test, bank = _parts(data.dataset, data.cache)
    return replace(
        data,
        train_dataset=str(train),
        val_dataset=None if test is None else str(test),
        bank_dataset=data.bank_dataset if bank is None else str(bank),
    )


Parts = tuple[Path, Path | None, Path | None]


def _parts(name: str, cache: str) -> Parts:
    """(images to learn from, images to evaluate on, labelled images for their neighbours) of a
    name, a folder or a file. The third is None where the first serves.
    """
    is_named = name in SETS or name.startswith(HUGGING_FACE)
    if not is_named:
        return _parts_of_folder(Path(name))
    unlabelled = name in SETS and "unlabeled" in SETS[name].splits
    with Bars() as progress:
        train = named_dataset(name, "train", cache, progress=progress)
        try:
            test = named_dataset(name, "test", cache, progress=progress)
        except MissingPartError:
            test = None
        if not unlabelled:
            return train, test, None
        return named_dataset(name, "unlabeled", cache, progress=progress), test, train


def _parts_of_folder(path: Path) -> Parts:
    """As `_parts`; `unlabeled/` is learned from if it is there, and a part may be missing."""

    def part(*names: str) -> Path | None:
        for name in names:
            for found in (path / name, path / f"{name}.beton"):
                if found.exists():
                    return found
        return None

    folders = {entry.name for entry in path.iterdir() if entry.is_dir()} if path.is_dir() else set()
    if not {name for name in folders if not name.startswith(".")} <= {*PARTS, "unlabeled"}:
        return path, None, None  # classes, of which one may be called train
    held_out = part(*HELD_OUT)
    train, unlabelled = part("train"), part("unlabeled")
    if unlabelled is not None:
        return unlabelled, held_out, train
    if train is not None and (held_out is not None or len(list(path.iterdir())) == 1):
        return train, held_out, None
    return part_of(path, "train"), None, None


def _common_side(dataset: Dataset) -> int | None:
    """The shorter side of images that all have one small size; of some of them, looked at."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), 64)).astype(np.int64))
    # An image that cannot be read is named when it is needed, or left out (data.on_error).
    unreadable: dict[int, str] = {}
    sides = set()
    with closing(dataset.feed([chosen], unreadable)) as feed:
        for part in feed.fetch(0):
            sides |= {(int(h), int(w)) for h, w in zip(part.height, part.width, strict=True)}
    if unreadable:
        sides.discard((0, 0))
    if len(sides) != 1:
        return None
    shorter = min(next(iter(sides)))
    return shorter if shorter <= MAX_SIDE else None


def _with_sizes(views: ViewsConfig, side: int | None) -> ViewsConfig:
    size = views.size or side or LARGE_SIZE
    small = views.small_size
    if views.small and not small:
        small = max(1, round(SMALL_VIEW * size))
    return replace(views, size=size, small_size=small)


def _odd(pixels: float) -> int:
    """The nearest odd number, at least 3."""
    return max(3, 2 * round((pixels - 1) / 2) + 1)


def _with_net_options(model: Any, size: int) -> tuple[Any, list[str]]:
    """Section `model` for views of `size` pixels, and a note: a 3x3 stem where a ResNet of
    torchvision meets small images; the number of a transformer's patches.
    """
    given = {pair.partition("=")[0] for pair in model.arch_options or ()}
    if "image_size" in (option_names(model.arch) or ()) and "image_size" not in given:
        options = (*(model.arch_options or ()), f"image_size={size}")
        return replace(model, arch_options=options), []
    pretrained = model.pretrained or model.init
    if model.arch not in RESNETS or size > SMALL_STEM_UP_TO or "small_stem" in given or pretrained:
        return model, []
    options = (*(model.arch_options or ()), "small_stem=true")
    note = f"{model.arch} with a 3x3 stem, because the views have {size} px (small_stem)"
    return replace(model, arch_options=options), [note]


# ---------------------------------------------------------------- checks with the data


def check(cfg: SimpleNamespace, processes: int) -> Images:
    """The opened data sets. ConfigError, or another error for the user, for what cannot work."""
    training = cfg.training
    if (
        training.resume == "auto"
        and cfg.logging.run_id is None
        and not distributed.started_by_torchrun()
    ):
        raise ConfigError("training.resume=auto needs logging.run_id, the run to resume")
    if distributed.started_by_torchrun():
        processes = count_in("WORLD_SIZE")
    images = Images(cfg)
    batch = global_batch_size(cfg, processes, images=len(images.train))
    check_batch(cfg, processes, batch)
    view_crops(cfg)
    if training.resume is None:  # a resumed run takes its weights from its checkpoint
        views = cfg.views
        sizes = {views.size, cfg.validation.resolution, *([views.small_size] * bool(views.small))}
        spec = encoder_spec(cfg, images.num_classes)
        check_start(cfg.model, spec, images.train.classes, sizes=sorted(sizes))
    for view in range(cfg.views.count + cfg.views.small):
        view_options(cfg.views, view)
    return images


def accumulates(ssl: SslConfig) -> bool:
    """Whether a step may consist of several passes: no image is compared with those of another."""
    return ssl.method in ACCUMULATES and not (ssl.method == "moco" and ssl.version == 3)


def check_batch(cfg: SimpleNamespace, processes: int, batch: int) -> None:
    """ConfigError for batches that the method cannot work with."""
    ssl = cfg.ssl
    if batch < 2 * processes:
        raise ConfigError(
            f"batches of {batch} images, one in a process: batch norm and {ssl.method} need two or "
            "more; give a larger training.batch_size"
        )
    if processes > 1:
        if batch % processes:
            raise ConfigError(
                f"batches of {batch} images are not a multiple of {processes} processes; give "
                "another training.global_batch_size"
            )
        if cfg.data.on_error != "error":
            raise ConfigError(
                f"data.on_error={cfg.data.on_error}: processes would hold different numbers of "
                "images; leave it out, or use one process"
            )
    largest = cfg.training.batch_size
    alone = batch // processes % largest == 1 if largest < batch // processes else largest == 1
    if alone:
        raise ConfigError(
            f"training.batch_size={largest}: leaves a part of one image of a step's "
            f"{batch // processes}, but batch norm needs two or more; give another"
        )
    if processes > 1 and ssl.stop_gradient == "columns":
        raise ConfigError(
            "ssl.stop_gradient=columns: compares the images of one process; give "
            "--ssl.stop_gradient=none for several"
        )
    if not accumulates(ssl):
        world = distributed.World(device=None, size=processes)  # type: ignore[arg-type]
        check_whole_batch(
            f"ssl.method={ssl.method}", cfg.training.batch_size, world=world, global_batch=batch
        )
    if ssl.method == "moco" and ssl.version < 3:
        keys = batch * (2 if ssl.symmetric else 1)
        if ssl.queue % keys:
            raise ConfigError(
                f"ssl.queue={ssl.queue}: must be a multiple of the {keys} keys of a step, such as "
                f"{max(1, round(ssl.queue / keys)) * keys}"
            )


# ---------------------------------------------------------------- crops and views


def view_crops(cfg: SimpleNamespace) -> list[RandomResizedCrop]:
    """A crop for each view: large ones, then small ones. ConfigError outside their ranges."""
    views = cfg.views
    try:
        large = RandomResizedCrop(views.size, views.scale, views.ratio, views.flip)
        crops = [large] * views.count
        if views.small:
            small = RandomResizedCrop(views.small_size, views.small_scale, views.ratio, views.flip)
            crops += [small] * views.small
    except ValueError as error:
        raise ConfigError(f"views: {error}") from None
    return crops


def view_options(views: ViewsConfig, view: int) -> ViewOptions:
    """What follows the crop of a view; the crop has done the flip."""

    def at(values: Sequence[Any]) -> Any:
        return values[view] if len(values) > 1 else values[0]

    size = views.size if view < views.count else views.small_size
    kernel = at(views.blur_kernel) or _odd(BLUR_SHARE * size)
    if at(views.blur) and kernel // 2 >= size:
        raise ConfigError(
            f"views.blur_kernel={kernel}: is too large for views of {size} px; give less than "
            f"{2 * size - 1}"
        )
    return ViewOptions(
        flip=0.0,
        jitter=at(views.jitter),
        strengths=views.strengths,
        grey=at(views.grey),
        blur=at(views.blur),
        kernel=kernel,
        sigma=views.blur_sigma,
        solarise=at(views.solarise),
    )


def encoder_spec(cfg: SimpleNamespace, num_classes: int) -> ModelSpec:
    return model_spec(cfg.model, num_classes)
