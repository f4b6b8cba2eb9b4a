"""Vision transformers of several widths as one trunk: families nested in their width.

    trunk = vit_family("vit_nested", (16, 32, 64, 128), {"patch": 4, "heads": 4})
    features = trunk(images, 32)  # [B, 3, 32, 32] -> [B, 32]

Every member of width d is a `vitfixedposdualpatchnorm` of dim=d (vit.py). FAMILIES differ in what
the members share:
    vit_independent   nothing
    vit_nested_proj   the projection of the patches, of which width d uses the first d rows
    vit_nested        everything: the weights of width d are the leading slices of the widest
                      member's, in the residual stream, in each head and in the MLP
Sources: one transformer with sliced widths, MatFormer (arXiv 2310.07707, the MLP) and Scala (arXiv
2412.04786, all of it), which also finds that the smallest width needs weights of its own
(`decoupled`); own norms per width, slimmable networks (arXiv 1812.08928).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from matryoshka.models.backbones import backbone
from matryoshka.models.options import FAMILIES, ModelError
from matryoshka.models.vit import Attention
from matryoshka.nested import check_dims

MEMBER = "vitfixedposdualpatchnorm"
SHARING = ("norms", "decoupled")  # options of vit_nested that its members do not have
MAX_WIDTHS = 32  # of a family: a damaged file can claim any number
NORMS = ("shared", "per_width")

# ---------------------------------------------------------------- slices of weights


def leading_slice(name: str, weight: Tensor, shape: Sequence[int], heads: int) -> Tensor:
    """The part of a wide member's parameter that a narrower one of `shape` uses; a view if it can.

    The first entries of every axis. Attention weights have a further axis, the heads, which is not
    sliced: every head gets narrower instead. The rows of qkv are [3, heads, head width], the
    columns of out [heads, head width].
    """
    part = weight.view(_axes(name, weight.shape, heads))
    for axis, size in enumerate(_axes(name, shape, heads)):
        part = part.narrow(axis, 0, size)
    return part.reshape(tuple(shape))


def _axes(name: str, shape: Sequence[int], heads: int) -> tuple[int, ...]:
    """`shape` with the axis of the heads."""
    if name.endswith("attention.qkv.weight"):
        rows, width = shape
        return 3, heads, rows // (3 * heads), width
    if name.endswith("attention.out.weight"):
        width, inner = shape
        return width, heads, inner // heads
    return tuple(shape)


# ---------------------------------------------------------------- the trunk


class WidthFamily(nn.Module):
    """Members of several widths, of which the narrower ones borrow weights of the widest.

    members: one trunk per width, narrowest first. is_own(number of the member, name of a parameter)
    says whether a member other than the widest keeps that parameter; the others are removed from it
    and sliced from the widest member in every forward pass. The fixed positions are those of each
    width, because every member computes its own.
    """

    def __init__(
        self,
        dims: Sequence[int],
        members: Sequence[nn.Module],
        heads: int,
        is_own: Callable[[int, str], bool],
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.heads = heads
        self.members = nn.ModuleDict(
            {str(d): member for d, member in zip(dims, members, strict=True)}
        )
        # {width: {name: shape}} of the parameters that a member borrows.
        self.borrowed: dict[int, dict[str, tuple[int, ...]]] = {}
        for number, (dim, member) in enumerate(zip(dims[:-1], members[:-1], strict=True)):
            self.borrowed[dim] = {}
            for name, parameter in list(member.named_parameters()):
                if not is_own(number, name):
                    self.borrowed[dim][name] = tuple(parameter.shape)
                    path, _, leaf = name.rpartition(".")
                    member.get_submodule(path).register_parameter(leaf, None)
        self.borrowed[dims[-1]] = {}

    def forward(self, images: Tensor, dim: int | None = None) -> Tensor:
        """Features of one width, the widest by default: [B, 3, H, W] -> [B, dim]."""
        return self.features(images, [self.dims[-1] if dim is None else dim])[0]

    def features(self, images: Tensor, dims: Sequence[int]) -> list[Tensor]:
        """Features [B, d] of each of some widths, in their order."""
        weights = self._borrowed_weights(dims)
        found = []
        for dim in dims:
            member = self.members[str(dim)]
            if weights[dim]:
                found.append(functional_call(member, weights[dim], (images,)))
            else:
                found.append(member(images))
        return found

    def _borrowed_weights(self, dims: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """{width: {name: slice}} of some widths.

        Each slice is taken from the next wider of these widths that has the whole weight: the
        gradient of a slice fills the tensor that it was taken from with zeros, which costs as much
        as that tensor is large.
        """
        wider = dict(self.members[str(self.dims[-1])].named_parameters())
        weights: dict[int, dict[str, Tensor]] = {}
        for dim in sorted(set(dims), reverse=True):
            weights[dim] = {}
            for name, shape in self.borrowed[dim].items():
                weights[dim][name] = leading_slice(name, wider[name], shape, self.heads)
            wider = wider | weights[dim]
        return weights

    def weights_of(self, dim: int) -> dict[str, Tensor]:
        """All parameters of one width, under the names of a stand-alone member."""
        own = dict(self.members[str(dim)].named_parameters())
        return own | self._borrowed_weights([dim])[dim]


# ---------------------------------------------------------------- by name


def vit_family(arch: str, dims: Sequence[int], options: Mapping[str, Any]) -> WidthFamily:
    """The trunk of a family, a name of FAMILIES, with members of the widths `dims`.

    options: those of a member but `dim`, and for vit_nested `norms` (shared: one affine part of
    each norm, sliced; per_width: one for each width) and `decoupled` (true: the smallest width has
    weights of its own). ModelError for a width or an option that is not possible.
    """
    dims = check_dims(dims, max(dims, default=0))
    if len(dims) > MAX_WIDTHS:
        raise ModelError(f"model.dims: {len(dims)} widths; {arch} takes at most {MAX_WIDTHS}")
    sharing, shared_options = _split_options(arch, options)
    members = [_member(dims, dim, shared_options) for dim in dims]
    attention = members[-1].get_submodule("blocks.0.attention")
    assert isinstance(attention, Attention)
    return WidthFamily(dims, members, attention.heads, _ownership(arch, sharing, members[0]))


def member_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a family that its members have, too."""
    return {name: value for name, value in options.items() if name not in SHARING}


def _split_options(arch: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(norms and decoupled, options of the members). ModelError for a wrong one."""
    where = f"model.arch_options: {arch}"
    if "dim" in options:
        raise ModelError(f"{where}: dim={options['dim']}: the widths are model.dims; leave it out")
    if "vqvae" in options:
        raise ModelError(f"{where}: vqvae: every width has its own codes; leave it out")
    given = {name: options[name] for name in SHARING if name in options}
    if given and arch != "vit_nested":
        raise ModelError(
            f"{where}: {next(iter(given))} is for vit_nested, where the widths share these weights"
        )
    sharing = {"norms": "shared", "decoupled": False} | given
    if sharing["norms"] not in NORMS:
        raise ModelError(f"{where}: norms={sharing['norms']}: expected {' or '.join(NORMS)}")
    if type(sharing["decoupled"]) is not bool:
        raise ModelError(f"{where}: decoupled={sharing['decoupled']}: expected true or false")
    return sharing, member_options(options)


def _member(dims: Sequence[int], dim: int, options: Mapping[str, Any]) -> nn.Module:
    try:
        return backbone(MEMBER, None, {**options, "dim": dim})[0]
    except ModelError as error:
        _, found, reason = str(error).partition(f"{MEMBER}: dim=")
        if not found:
            raise
        shown = ",".join(map(str, dims))
        raise ModelError(f"model.dims={shown}: dim={reason}") from None


def _ownership(
    arch: str, sharing: Mapping[str, Any], member: nn.Module
) -> Callable[[int, str], bool]:
    """Which parameters a narrower member keeps: f(number of the member, name)."""
    norms = [name for name, module in member.named_modules() if "norm" in name.rpartition(".")[2]]

    def is_own(number: int, name: str) -> bool:
        if arch == "vit_independent":
            return True
        if arch == "vit_nested_proj":
            return not name.startswith("patches.project.")
        if sharing["decoupled"] and number == 0:
            return True
        # A learned temperature replaces 1 / sqrt(width of a head), which differs per width.
        if name.endswith("attention.temperature"):
            return True
        is_norm = name.rpartition(".")[0] in norms
        return is_norm and sharing["norms"] == "per_width"

    return is_own


__all__ = ["FAMILIES", "MEMBER", "WidthFamily", "leading_slice", "member_options", "vit_family"]
