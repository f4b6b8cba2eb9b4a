"""Options of self-supervised methods and their views, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.config import check_fields, option
from matryoshka.config.limits import (
    MAX_COUNT,
    MAX_JITTER,
    MAX_RATIO,
    MAX_TEMPERATURE,
    MAX_WEIGHT,
    MIN_RATIO,
    MIN_TEMPERATURE,
)

METHODS = ("relic", "moco", "simclr", "byol", "vicreg", "sigreg")
WITH_TARGET = ("relic", "moco", "byol")  # a second tower, which follows the first
WITH_TEMPERATURE = ("relic", "moco", "simclr")
MULTI_CROP = ("relic", "moco", "byol", "sigreg")  # know what to do with small views
# Compare a batch's images only with what a queue or a target holds: gradients may be accumulated.
ACCUMULATES = ("byol", "moco")
PROJECTORS = ("mrl", "mrl-e", "none")
STOP_GRADIENTS = ("none", "first", "second", "columns")


@dataclass(frozen=True)
class SslConfig:
    """Section `ssl`."""

    method: str = option("relic", help="method", choices=METHODS, common=True)
    encoder: str = option(
        "auto",
        help="the tower that is evaluated and saved; auto: target for relic, else online",
        choices=("auto", "online", "target"),
    )
    projector: str = option(
        "mrl",
        help="layers between the features and the loss. mrl: for each prefix of the features its "
        "own; mrl-e: one, sliced; none: the loss takes the prefixes themselves (with model.neck: "
        "of its output)",
        choices=PROJECTORS,
        common=True,
    )
    hidden: int = option(
        0,
        help="numbers of a projector's hidden layers; 0: 512 for mrl, the longest prefix for mrl-e",
        low=0,
        high=65536,
    )
    layers: int = option(2, help="layers of a projector (mrl)", low=1, high=4)
    out: int = option(
        64, help="numbers of a projector's output, for each prefix", low=1, high=65536
    )
    norm: bool = option(True, help="batch norm behind the hidden layers of a projector (mrl)")
    predictor: bool | None = option(
        None, help="further layers of the online tower alone; unset: byol, moco version 3"
    )
    symmetric: bool | None = option(None, help="moco: each view is query and key; unset: version 3")
    version: int = option(
        2, help="moco: 1 and 2 have a queue; 3 has none, but a predictor", low=1, high=3
    )
    queue: int = option(4096, help="moco: keys in the queue", low=1, high=10_000_000)
    shuffle_bn: bool = option(
        True,
        help="moco: keys are computed in another order of the images, and in groups, so that batch "
        "norm does not tell which belong together",
    )
    bn_group: int = option(
        0,
        help="moco: keys of a process that share batch norm's statistics; 0: 64 with a queue on "
        "one process, else all",
        low=0,
        high=1_000_000,
    )
    temperature: tuple[float, ...] = option(
        (0.2,),
        help="of similarities: one, or one for each prefix",
        low=MIN_TEMPERATURE,
        high=MAX_TEMPERATURE,
    )
    learn_temperature: bool = option(
        False, help="relic: learn it, from ssl.temperature on, but not below ssl.least_temperature"
    )
    least_temperature: float = option(
        0.05,
        help="with learn_temperature: its bound",
        low=MIN_TEMPERATURE,
        high=MAX_TEMPERATURE,
    )
    alpha: float = option(1.0, help="relic: weight of the invariance", low=0, high=MAX_WEIGHT)
    stop_gradient: str = option(
        "second",
        help="relic: which of the two compared distributions has no gradient; columns: the term "
        "of the repository relic",
        choices=STOP_GRADIENTS,
    )
    momentum: float = option(0.99, help="decay of the target's average at the start", low=0, high=1)
    momentum_end: float = option(
        1.0, help="decay at the end, reached along half a cosine", low=0, high=1
    )
    momentum_after: int = option(
        0, help="steps in which the target is a copy", low=0, high=MAX_COUNT
    )
    momentum_every: int = option(
        1, help="steps between two updates of the target", low=1, high=MAX_COUNT
    )
    invariance: float = option(
        25.0, help="vicreg: weight of the views' distance", low=0, high=MAX_WEIGHT
    )
    variance: float = option(
        25.0, help="vicreg: weight of the standard deviations", low=0, high=MAX_WEIGHT
    )
    covariance: float = option(
        1.0, help="vicreg: weight of the covariances", low=0, high=MAX_WEIGHT
    )
    gaussian: float = option(
        0.05,
        help="sigreg: weight of the distance from a Gaussian; 1 minus it of the views'",
        low=0,
        high=1,
    )
    directions: int = option(256, help="sigreg: random directions in a step", low=1, high=65536)
    knots: int = option(17, help="sigreg: points of the integral", low=2, high=1000)

    def __post_init__(self) -> None:
        check_fields(self, "ssl")
        if self.encoder == "target" and self.method not in WITH_TARGET:
            raise ValueError(f"ssl.encoder=target: {self.method} has one tower; leave it out")
        if self.learn_temperature and self.method != "relic":
            raise ValueError(f"ssl.learn_temperature=1: is for relic, not {self.method}")
        if self.learn_temperature and min(self.temperature) <= self.least_temperature:
            raise ValueError(
                f"ssl.temperature={min(self.temperature):g}: must be more than "
                f"ssl.least_temperature={self.least_temperature:g}, its bound"
            )
        if self.momentum_end < self.momentum:
            raise ValueError(
                f"ssl.momentum_end={self.momentum_end:g}: less than ssl.momentum={self.momentum:g}"
            )


def _check_strengths(strengths: tuple[float, float, float, float]) -> None:
    if strengths[3] > 0.5:
        raise ValueError(f"expected a hue of 0 to 0.5, got {strengths[3]:g}")


@dataclass(frozen=True)
class ViewsConfig:
    """Section `views`: what a step sees of an image. Several values: one for each view in turn."""

    count: int = option(2, help="large views of an image", low=2, high=16, common=True)
    size: int = option(
        0,
        help="pixels of a view's side; 0: 224, or the images' own if all have the same, at most 96",
        low=0,
        high=16384,
        common=True,
    )
    scale: tuple[float, float] = option(
        (0.2, 1.0), help="area of a view, share of the image: low,high", above=0, high=1
    )
    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3),
        help="width / height: low,high",
        low=MIN_RATIO,
        high=MAX_RATIO,
    )
    small: int = option(0, help="further, small views (multi-crop)", low=0, high=64)
    small_size: int = option(0, help="pixels of their side; 0: 3/7 of size", low=0, high=16384)
    small_scale: tuple[float, float] = option(
        (0.05, 0.2), help="their area: low,high", above=0, high=1
    )
    flip: float = option(0.5, help="probability of a horizontal flip", low=0, high=1)
    jitter: tuple[float, ...] = option((0.8,), help="probability of colour jitter", low=0, high=1)
    strengths: tuple[float, float, float, float] = option(
        (0.4, 0.4, 0.4, 0.1),
        help="of brightness,contrast,saturation,hue, as torchvision's ColorJitter",
        low=0,
        check=_check_strengths,
        high=MAX_JITTER,
    )
    grey: tuple[float, ...] = option((0.2,), help="probability of greyscale", low=0, high=1)
    blur: tuple[float, ...] = option((0.0,), help="probability of blur", low=0, high=1)
    blur_kernel: tuple[int, ...] = option(
        (0,), help="pixels of the blur's kernel, odd; 0: a tenth of the view", low=0, high=1023
    )
    blur_sigma: tuple[float, float] = option(
        (0.1, 2.0),
        help="standard deviation of the blur: low,high",
        low=0.01,
        high=100,
    )
    solarise: tuple[float, ...] = option(
        (0.0,), help="probability of inverted bright values", low=0, high=1
    )

    def __post_init__(self) -> None:
        check_fields(self, "views")
        for kernel in self.blur_kernel:
            if kernel and kernel % 2 == 0:
                raise ValueError(f"views.blur_kernel={kernel}: expected an odd number of pixels")
        for name in ("scale", "ratio", "small_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"views.{name}={low:g},{high:g}: expected low,high")
        total = self.count + self.small
        for name in ("jitter", "grey", "blur", "blur_kernel", "solarise"):
            given = len(getattr(self, name))
            if given not in (1, total):
                raise ValueError(
                    f"views.{name}: {given} values for {total} views; give one, or {total}"
                )
