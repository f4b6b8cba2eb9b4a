"""Options that name a checkpoint, as the papers' programs have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matryoshka.config import option
from matryoshka.config.limits import MAX_DIM


@dataclass(frozen=True, kw_only=True)
class PathOption:
    """The checkpoint."""

    path: str = option(
        help="model.safetensors, upstream's final_weights.pt, or a published baseline: "
        "torchvision:NAME[.WEIGHTS], timm:NAME",
        common=True,
        existing=True,
    )


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What upstream's .pt files do not say about themselves; for these files alone."""

    mrl: bool = option(False, help="an upstream checkpoint trained with MRL", common=True)
    efficient: bool = option(False, help="with --mrl: MRL-E")
    rep_size: int | None = option(
        None,
        help="width of an upstream fixed-feature checkpoint",
        flag="--rep_size",
        low=1,
        high=MAX_DIM,
    )
    old_ckpt: bool = option(
        False, help="an upstream checkpoint with the keys of its first release", flag="--old_ckpt"
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(HeadOptions, PathOption):  # fields in the order path, mrl, ...
    """Arguments of `load_any`."""


@dataclass(frozen=True, kw_only=True)
class AdapterOption:
    """A map behind the encoder."""

    adapter: str | None = option(
        None,
        help="adapter of `matryoshka adapt`, which embeddings go through",
        metavar="FILE",
        common=True,
        existing=True,
    )


def load_flags(args: Any) -> dict[str, Any]:
    """The keyword arguments of `load_any` that the flags of HeadOptions mean."""
    return {
        "mrl": args.mrl and not args.efficient,  # upstream's MRL-E is --mrl --efficient
        "efficient": args.efficient,
        "rep_size": args.rep_size,
        "old_ckpt": args.old_ckpt,
    }
