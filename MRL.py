"""The public names of three repositories, for code that was written for them.

MRL (the paper): MRL_Linear_Layer, Matryoshka_CE_Loss, FixedFeatureLayer, with its signatures,
attributes and state_dict keys. New code uses `matryoshka.nested`, which these classes call.

MoCo-Matryoshka: MoCoMatryoshkaLoss and create_moco_matryoshka_resnet50, with its signatures. New
code uses `matryoshka.ssl`.

Matryoshka ViT compression: MRL_Entire_Transformer, MRL_Entire_Transformer_NestedProj,
ViTFixedPosDualPatchNorm and load_vit_model, with its signatures and its files; state_dict keys are
ours. New code uses `matryoshka.models.build` with vit_independent, vit_nested_proj or vit_nested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.checkpoint import load_model, save_vit_pth
from matryoshka.losses import info_nce, over_prefixes
from matryoshka.models import ModelSpec, NestedModel, build, extract
from matryoshka.nested import check_dims, nested_logits
from matryoshka.ssl.queue import KeyQueue

__all__ = [
    "FixedFeatureLayer",
    "MRL_Entire_Transformer",
    "MRL_Entire_Transformer_NestedProj",
    "MRL_Linear_Layer",
    "Matryoshka_CE_Loss",
    "MoCoMatryoshkaLoss",
    "ViTFixedPosDualPatchNorm",
    "create_moco_matryoshka_resnet50",
    "load_vit_model",
]

# ---------------------------------------------------------------- MRL


class Matryoshka_CE_Loss(nn.Module):
    """sum_g relative_importance[g] * CrossEntropyLoss(**kwargs)(output[g], target) -> scalar.

    output: [G, B, C] or a sequence of G tensors [B, C]; target [B]. The sum is not divided by G.
    """

    def __init__(self, relative_importance: Sequence[float] | None = None, **kwargs) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(**kwargs)
        self.relative_importance = relative_importance

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        losses = torch.stack([self.criterion(logits, target) for logits in output])
        if self.relative_importance is None:
            return losses.sum()
        if len(self.relative_importance) != len(losses):
            raise ValueError(
                f"relative_importance has {len(self.relative_importance)} weights for "
                f"{len(losses)} outputs"
            )
        # On the device of the losses: upstream's version fails on a GPU.
        return (losses * losses.new_tensor(self.relative_importance)).sum()


class MRL_Linear_Layer(nn.Module):
    """Nested classifiers as modules `nesting_classifier_{i}` -> tuple of G logits [B, C], shortest
    prefix first.

    efficient=False: one nn.Linear(nesting_list[i], num_classes, **kwargs) per prefix (MRL).
    efficient=True: `nesting_classifier_0` alone, of the longest width, sliced for every prefix
    (MRL-E).
    """

    def __init__(
        self,
        nesting_list: Sequence[int],
        num_classes: int = 1000,
        efficient: bool = False,
        **kwargs,
    ) -> None:
        super().__init__()
        self.nesting_list = list(check_dims(nesting_list, max(nesting_list, default=0)))
        self.num_classes = num_classes
        self.efficient = efficient
        widths = self.nesting_list[-1:] if efficient else self.nesting_list
        # Attributes, not an nn.ModuleList: their names are the keys of upstream's state_dicts.
        for i, width in enumerate(widths):
            setattr(self, f"nesting_classifier_{i}", nn.Linear(width, num_classes, **kwargs))

    def _classifiers(self) -> list[nn.Linear]:
        count = 1 if self.efficient else len(self.nesting_list)
        return [getattr(self, f"nesting_classifier_{i}") for i in range(count)]

    def reset_parameters(self) -> None:
        for classifier in self._classifiers():
            classifier.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = [(classifier.weight, classifier.bias) for classifier in self._classifiers()]
        return tuple(nested_logits(x, heads, self.nesting_list))


class FixedFeatureLayer(nn.Linear):
    """nn.Linear on the first `in_features` columns of its input (keys `weight`, `bias`)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input[:, : self.in_features], self.weight, self.bias)


# ---------------------------------------------------------------- Matryoshka ViT compression


def _spec(arch: str, dims: Sequence[int], vit_kwargs: Mapping[str, Any]) -> ModelSpec:
    """Their arguments of a ViT as a specification of ours."""
    kwargs = {"pool": "cls", "channels": 3, "dropout": 0.0, "emb_dropout": 0.0, **vit_kwargs}
    for name, only in (("pool", "cls"), ("channels", 3), ("emb_dropout", kwargs["dropout"])):
        if kwargs[name] != only:
            raise ValueError(f"{name}={kwargs[name]}: only {name}={only} is supported")
    return ModelSpec(
        arch=arch,
        num_classes=kwargs["num_classes"],
        dims=tuple(dims),
        arch_options={
            "image_size": kwargs["image_size"],
            "patch": kwargs["patch_size"],
            "depth": kwargs["depth"],
            "heads": kwargs["heads"],
            "dropout": kwargs["dropout"],
        },
    )


class ViTFixedPosDualPatchNorm(nn.Module):
    """One ViT: images [B, 3, H, W] -> logits [B, num_classes].

    Keywords: image_size, patch_size, num_classes, dim, depth, heads, dropout; emb_dropout must be
    the same as dropout, pool "cls", channels 3. `model` is the NestedModel.
    """

    def __init__(self, *, dim: int, **vit_kwargs) -> None:
        super().__init__()
        spec = _spec("vitfixedposdualpatchnorm", (dim,), vit_kwargs)
        spec.arch_options["dim"] = dim
        self.model = build(spec)

    @classmethod
    def of(cls, model: NestedModel) -> ViTFixedPosDualPatchNorm:
        """Wrap a model of one width."""
        vit = cls.__new__(cls)
        nn.Module.__init__(vit)
        vit.model = model
        return vit

    def forward(self, img: Tensor) -> Tensor:
        return self.model(img)[-1]


class MRL_Entire_Transformer(nn.Module):
    """One independent ViT per width, `nesting_vit_{i}` -> tuple of logits [B, C], smallest first.

    vit_class is called with vit_kwargs and dim=nesting_list[i].
    """

    def __init__(
        self,
        nesting_list: Sequence[int],
        vit_class: Callable[..., nn.Module] = ViTFixedPosDualPatchNorm,
        vit_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.nesting_list = list(check_dims(nesting_list, max(nesting_list, default=0)))
        for i, dim in enumerate(self.nesting_list):
            setattr(self, f"nesting_vit_{i}", vit_class(dim=dim, **(vit_kwargs or {})))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.get_vit_model(i)(x) for i in range(len(self.nesting_list)))

    def get_vit_model(self, dim_index: int) -> nn.Module:
        """The ViT of nesting_list[dim_index]; -1 is the largest."""
        return getattr(self, f"nesting_vit_{range(len(self.nesting_list))[dim_index]}")

    def save_vit_model(self, dim_index: int, save_path: str | Path) -> None:
        """Write the .pth file of one ViT, which load_vit_model reads."""
        vit = self.get_vit_model(dim_index)
        if not isinstance(vit, ViTFixedPosDualPatchNorm):
            raise TypeError(f"{type(vit).__name__}: only ViTFixedPosDualPatchNorm can be saved")
        save_vit_pth(vit.model, save_path)


class MRL_Entire_Transformer_NestedProj(nn.Module):
    """Independent ViTs with one patch projection, of which width d uses the first d rows -> tuple
    of logits [B, C], smallest first.

    Keywords: those of ViTFixedPosDualPatchNorm but dim. `model` is the NestedModel.
    """

    def __init__(self, nesting_list: Sequence[int], **vit_kwargs) -> None:
        super().__init__()
        self.nesting_list = list(check_dims(nesting_list, max(nesting_list, default=0)))
        self.model = build(_spec("vit_nested_proj", self.nesting_list, vit_kwargs))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(x))

    def get_vit_model(self, dim_index: int) -> ViTFixedPosDualPatchNorm:
        """A copy of the ViT of nesting_list[dim_index]; -1 is the largest."""
        return ViTFixedPosDualPatchNorm.of(extract(self.model, self.nesting_list[dim_index]))

    def save_vit_model(self, dim_index: int, save_path: str | Path) -> None:
        """Write the .pth file of one ViT, which load_vit_model reads."""
        save_vit_pth(self.get_vit_model(dim_index).model, save_path)


def load_vit_model(path: str | Path) -> ViTFixedPosDualPatchNorm:
    """The ViT of an exported .pth file, in eval mode on the CPU: images -> logits [B, C].

    Reads files of that repository, also of its other classes, and ours.
    """
    return ViTFixedPosDualPatchNorm.of(load_model(path)).eval()


# ---------------------------------------------------------------- MoCo-Matryoshka

MOCO_DIMS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class MoCoMatryoshkaLoss(nn.Module):
    """The contrastive losses of all prefixes of queries and keys [B, D] -> (sum, list of floats).

    There is one queue of whole keys, from which each prefix is cut; that repository keeps one for
    each prefix. Keys of this call are pushed after the loss, so they are no negatives of it.
    """

    def __init__(
        self,
        nesting_list: Sequence[int] = MOCO_DIMS,
        temperature: float = 0.07,
        queue_size: int = 4096,
        relative_importance: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.nesting_list = check_dims(nesting_list, max(nesting_list))
        self.temperature = temperature
        self.queue = KeyQueue(queue_size, self.nesting_list[-1])
        self._loss = over_prefixes(info_nce, self.nesting_list, relative_importance)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, list[float]]:
        if len(k) > len(self.queue.keys):
            raise ValueError(f"{len(k)} keys, but the queue holds {len(self.queue.keys)}")
        k = k.detach()
        # A copy: the backward pass needs the negatives as they are now.
        negatives = self.queue.keys.clone()
        total, losses = self._loss(q, k, negatives, temperature=self.temperature, in_batch=False)
        self.queue.push(k[:, : self.nesting_list[-1]])
        return total, losses.tolist()


def create_moco_matryoshka_resnet50(
    nesting_list: Sequence[int] = MOCO_DIMS,
) -> tuple[nn.Module, nn.Module]:
    """(query, key) encoders: torchvision's ResNet-50 whose last layer gives the longest prefix.

    Equal weights; the key encoder has no gradients.
    """
    import torchvision  # takes seconds

    query = torchvision.models.resnet50(num_classes=max(nesting_list))
    key = torchvision.models.resnet50(num_classes=max(nesting_list))
    key.load_state_dict(query.state_dict())
    return query, key.requires_grad_(False)
