"""Published baselines: `torchvision:NAME[.WEIGHTS]` and `timm:NAME`, with one prefix, the whole
feature.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from matryoshka import checkpoint
from matryoshka.checkpoint.transfer import FIRST_WEIGHTS, TORCHVISION
from matryoshka.data.augment import Preprocessing
from matryoshka.models import (
    RESNETS,
    TIMM,
    ModelError,
    ModelSpec,
    NestedModel,
    backbone,
    build,
    import_timm,
    one_line,
)

PREFIXES = (TORCHVISION, TIMM)


def load_any(name: str, option: str = "--path", **flags: Any) -> NestedModel:
    """Load a checkpoint file or a published baseline, on the CPU, in eval mode.

    option: the name of the option that holds `name`, for error messages. flags: those of
    checkpoint.load_model; a published baseline accepts none of them.
    """
    if not name.startswith(PREFIXES):
        return checkpoint.load_model(name, **flags)
    given = [flag for flag, value in flags.items() if value not in (None, False)]
    if given:
        raise ModelError(
            f"{option} {name}: a published baseline takes no {', '.join(given)}; leave it out"
        )
    return load_published(name, option)


def load_published(name: str, option: str = "--path") -> NestedModel:
    """Load a published model with its own classifier and preprocessing, on the CPU, in eval mode.

    Weights come from the caches of torch and Hugging Face, which download what they lack.
    ModelError, one line, for an unknown name and for weights that cannot be loaded; option: as in
    load_any.
    """
    load = _timm if name.startswith(TIMM) else _torchvision
    try:
        model = load(name)
    except ModelError as error:
        raise ModelError(f"{option} {name}: {error}") from None
    except Exception as error:  # no network, a damaged file: each library has its own exceptions
        raise ModelError(f"{option} {name}: cannot load the weights: {one_line(error)}") from error
    model.notes = ["a published baseline: one prefix, the whole feature"]
    return model.eval()


def _torchvision(name: str) -> NestedModel:
    from torchvision.models import get_model_weights

    arch, _, weights = name.removeprefix(TORCHVISION).partition(".")
    if arch not in RESNETS:
        raise ModelError(f"unknown; known: {', '.join(RESNETS)}")
    known = get_model_weights(arch).__members__
    if (weights or FIRST_WEIGHTS) not in known:
        raise ModelError(f"no such weights are published; known: {', '.join(sorted(known))}")
    published: Any = known[weights or FIRST_WEIGHTS]

    _, width = backbone(arch)  # only its width; load_state_dict below fills the model
    model = build(ModelSpec(arch, len(published.meta["categories"]), (width,)))
    # Upstream's trunks are torchvision's: the keys are the same, with the classifier as `fc`.
    state = published.get_state_dict(check_hash=True, weights_only=True)
    model.load_state_dict(checkpoint.from_upstream(state))

    transform = published.transforms()
    size = transform.crop_size[0]
    model.preprocessing = Preprocessing(
        size=size,
        ratio=size / transform.resize_size[0],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
    return model


def _timm(name: str) -> NestedModel:
    arch = name.partition(".")[0]
    weights = name.removeprefix(TIMM)
    timm = import_timm(name)
    # is_model_pretrained also refuses hf-hub:..., which would run code of that repository
    if not timm.models.is_model_pretrained(weights):
        family = weights.partition(".")[0]
        known = [other for other in timm.list_pretrained() if other.partition(".")[0] == family]
        raise ModelError(f"no such weights are published; known: {', '.join(known) or 'none'}")
    whole: Any = timm.create_model(weights, pretrained=True)
    classifier = whole.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise ModelError("its classifier is not one linear layer; choose another model")

    # The same weights as trunk and head: move the classifier's from its place in timm's model.
    model = build(ModelSpec(arch, classifier.out_features, (classifier.in_features,)))
    state = {f"trunk.{key}": value for key, value in whole.state_dict().items()}
    name_in_timm = next(key for key, module in whole.named_modules() if module is classifier)
    for leaf in dict(classifier.named_parameters()):
        state[f"head.heads.0.{leaf}"] = state.pop(f"trunk.{name_in_timm}.{leaf}")
    model.load_state_dict(state)

    cfg = whole.pretrained_cfg
    model.preprocessing = Preprocessing(
        size=cfg["input_size"][-1],
        ratio=cfg.get("crop_pct") or 1.0,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )
    return model
