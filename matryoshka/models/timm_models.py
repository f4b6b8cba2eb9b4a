"""Trunks of timm: `timm:NAME` is any of its models that returns one vector per image."""

from __future__ import annotations

import difflib
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from matryoshka.data.hub import offline_without_network, quiet_hub
from matryoshka.models.options import ModelError
from matryoshka.models.sizes import check_counts, check_multiple

TIMM = "timm:"  # prefix of a timm model's name in model.arch, model.init and --path

# Options of create_model that read other files or the network. A checkpoint can contain options,
# and opening it must not do either.
FORBIDDEN_OPTIONS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def timm_model(name: str, weights: str | None = None, **options: Any) -> tuple[nn.Module, int]:
    """(trunk, feature width) of a timm model without its classifier.

    `weights` is the model's name with or without the tag of its published weights; None initialises
    at random and downloads nothing. `options` are keyword arguments of timm.create_model.

    A transformer with a fixed input size gets timm's resampling of position embeddings, where timm
    supports it for that model: it then accepts other sizes and gives the same numbers at its native
    size.
    """
    forbidden = [option for option in FORBIDDEN_OPTIONS if option in options]
    if forbidden:
        raise ModelError(f"model.arch_options: {forbidden[0]} is not allowed; use model.init")
    option = f"model.arch={TIMM}{name}" if weights is None else f"model.init={TIMM}{weights}"
    timm = import_timm(option)
    # is_model also refuses hf-hub:..., for which timm would download the architecture
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" (did you mean {TIMM}{near[0]}?)" if near else ""
        raise ModelError(f"{option} is unknown to timm {timm.__version__}{hint}")

    def create(**extra: Any) -> Any:
        with _published_weights() if weights is not None else nullcontext():
            return timm.create_model(
                weights or name,
                pretrained=weights is not None,
                num_classes=0,  # no classifier: the trunk returns features [B, D]
                **extra,
            )

    try:
        cfg = timm.models.get_pretrained_cfg(name)
        # Without this option a ViT refuses every size but its native one: position embeddings have
        # a fixed grid.
        if getattr(cfg, "fixed_input_size", False) and "dynamic_img_size" not in options:
            try:
                trunk = create(dynamic_img_size=True, **options)
            except TypeError:  # this model does not have the option
                trunk = create(**options)
        else:
            trunk = create(**options)
    except (RuntimeError, AssertionError) as error:  # unknown tag, retired name, unfitting weights
        raise ModelError(f"{option}: {one_line(error)}") from None
    # A hidden layer before the classifier belongs to the trunk; then the two widths differ.
    width: Any = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    return trunk, width


@contextmanager
def _published_weights() -> Generator[None]:
    """For a download. OSError if the hub cannot be reached and its cache lacks the weights."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    with quiet_hub(), offline_without_network():
        try:
            yield
        except LocalEntryNotFoundError:
            raise OSError(
                f"{constants.ENDPOINT} cannot be reached, and {constants.HF_HUB_CACHE} does not "
                "have them; connect once, or leave them out: --model.pretrained=0"
            ) from None


# Our short names of timm's models, with their sizes.
TIMM_NAMES = {"mobilevit": "mobilevit_xxs", "vit_timm": "vit_base_patch16_384"}


def mobilevit(weights: str | None = None, *, image_size: int = 64) -> tuple[nn.Module, int]:
    """(trunk, 320) of MobileViT-XXS (Mehta and Rastegari 2022, arXiv 2110.02178)."""
    check_counts("mobilevit", image_size=image_size)
    check_multiple(
        "mobilevit", 64, "its five halvings and patches of 2 pixels need", image_size=image_size
    )
    return timm_model(TIMM_NAMES["mobilevit"], weights)


def vit_timm(weights: str | None = None, *, image_size: int = 384) -> tuple[nn.Module, int]:
    """(trunk, 768) of a ViT-B/16; published weights are for 384 px, positions are resampled."""
    check_counts("vit_timm", image_size=image_size)
    check_multiple("vit_timm", 16, "is the side of its patches", image_size=image_size)
    return timm_model(TIMM_NAMES["vit_timm"], weights)


def import_timm(option: str):
    """Import timm. ModelError naming `option`, which needs it, if it is not installed."""
    try:
        import timm
    except ImportError:
        raise ModelError(f"{option} needs timm: pip install timm") from None
    return timm


def one_line(error: Exception) -> str:
    """The message of another library's exception on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
