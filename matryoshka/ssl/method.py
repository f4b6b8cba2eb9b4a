"""What the methods have in common: towers, prefixes, averages.

A method is one file: a subclass of Method with `forward`, which computes embeddings, and `loss`,
which puts a pure function of losses.py over the prefixes. Between the two, the caller gathers the
embeddings of all ranks:

    own = ddp(views, target_views)
    all_ranks = gathered(own, world)
    loss, per_prefix = method.loss(own, all_ranks, first=row of the first own image)
    ...
    method.after_step(all_ranks, momentum)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from matryoshka.losses import NestedLoss, over_prefixes
from matryoshka.models import NestedModel
from matryoshka.ssl.options import SslConfig
from matryoshka.ssl.projector import make_predictor, make_projector
from matryoshka.ssl.towers import Target, Tower, Towers


def has_predictor(config: SslConfig) -> bool:
    """Whether the online tower ends with a predictor; by default as in the method's paper."""
    if config.predictor is not None:
        return config.predictor
    return config.method == "byol" or (config.method == "moco" and config.version == 3)


class Method(nn.Module):
    """online: the tower that is trained. target: the one that follows it, or None.

    weights: of the prefixes' losses; large: how many of the views are large; bn_group: images of
    the target that share batch norm's statistics, 0 for all of a process. They may be set after
    construction.
    """

    target: Target | None

    def __init__(self, encoder: NestedModel, config: SslConfig) -> None:
        super().__init__()
        self.config = config
        self.dims = encoder.dims
        # Its classifiers are not trained by the method.
        encoder.head.requires_grad_(False)
        projector = make_projector(encoder.dims, config, predicted=has_predictor(config))
        self.online = Tower(encoder, projector)
        self.columns = self.online.projector.columns
        self.predictor = make_predictor(self.columns, config) if has_predictor(config) else None
        self.target = None
        self.weights: Sequence[float] | None = None
        self.large = 2
        self.bn_group = 0

    # ---------------------------------------------------------------- for subclasses

    def one_tower(self, views: Sequence[Tensor]) -> Towers:
        features, online = zip(*(self.online(view) for view in views), strict=True)
        return Towers(list(online), [], features[0].detach())

    def two_towers(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        assert self.target is not None
        features, online = zip(*(self.online(view) for view in views), strict=True)
        if self.predictor is not None:
            online = [self.predictor(embedding) for embedding in online]
        seen_by_target = [self.target(view, self.bn_group) for view in target_views]
        target_features, target = zip(*seen_by_target, strict=True)
        seen = target_features if self.evaluates_target else features
        return Towers(list(online), list(target), seen[0].detach())

    def nested(
        self, loss: Callable[..., Tensor], shares: dict[str, Sequence[Any]] | None = None
    ) -> NestedLoss:
        """`loss` over the prefixes' columns. shares: arguments with a value for each prefix."""
        return over_prefixes(loss, self.columns, self.weights, shares)

    def temperatures_by_prefix(self) -> dict[str, Sequence[Any]] | None:
        """ssl.temperature for each prefix; None where it is learned."""
        if self.config.learn_temperature:
            return None
        given = self.config.temperature
        values = given * len(self.dims) if len(given) == 1 else given
        return {"temperature": values}

    # ---------------------------------------------------------------- for the caller

    def forward(self, views: Sequence[Tensor], target_views: Sequence[Tensor]) -> Towers:
        """Embeddings of the views, float [B, 3, H, W] each; target_views: those of `key_views`."""
        raise NotImplementedError

    def loss(
        self, own: Towers, all_ranks: Towers, first: int, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """(scalar, detached loss of each prefix [G]); own images are rows `first` on of all."""
        raise NotImplementedError

    def query_views(self, views: int, large: int) -> tuple[int, ...]:
        """Which of the views the online tower sees."""
        return tuple(range(views))

    def key_views(self, large: int) -> tuple[int, ...]:
        """Which of the views the target sees."""
        return tuple(range(large)) if self.target is not None else ()

    @property
    def evaluates_target(self) -> bool:
        """Whether the target's encoder is the one that is evaluated and saved."""
        if self.config.encoder == "auto":
            return self.config.method == "relic"
        return self.config.encoder == "target"

    @property
    def encoder(self) -> NestedModel:
        """The encoder that is evaluated and saved."""
        if self.evaluates_target:
            assert self.target is not None
            return self.target.tower.encoder
        return self.online.encoder

    @property
    def encoder_path(self) -> str:
        """Where `encoder` is, with a final dot."""
        return "target.tower.encoder." if self.evaluates_target else "online.encoder."

    def after_part(self, all_ranks: Towers, skipped: Tensor | None = None) -> None:
        """What follows each part of a step: the queue. skipped: whether the step was, bool, 0-d."""

    def after_step(self, all_ranks: Towers, momentum: float, skipped: Tensor | None = None) -> None:
        """What follows the optimizer's step: the target's average, and `after_part` of the last."""
        if self.target is not None:
            self.target.follow(self.online, momentum)
        self.after_part(all_ranks, skipped)
