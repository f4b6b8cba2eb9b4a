"""VQ-VAE for small images, whose encoder gives a transformer its tokens (`vitfixedposvqvae`).

    vqvae = VqVae(EncoderSizes(), codes=512)
    result = vqvae(images)            # result.error + 0.25 * result.commitment is minimised
    save_vqvae(vqvae, "vqvae.safetensors", mean, std)
    encoder = read_encoder("vqvae.safetensors").encoder

Source: van den Oord et al. 2017 (arXiv 1711.00937), with the codes as moving averages (appendix A).
The encoder sees whole images in training and in use: one code for each patch, which a few pixels
around the patch influence, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka import tensor_files
from matryoshka.files import write_atomically
from matryoshka.models.options import ModelError
from matryoshka.models.sizes import check_counts

FORMAT = "matryoshka-vqvae-1"
COMMITMENT = 0.25
DECAY = 0.99
UNUSED = 0.1  # a code restarts below this share of equal usage


@dataclass(frozen=True)
class EncoderSizes:
    """patch: pixels per code and side, a power of two from 2. code_dim: width of a code."""

    patch: int = 4
    hiddens: int = 128
    residual_hiddens: int = 32
    residual_layers: int = 2
    code_dim: int = 64

    @property
    def halvings(self) -> int:
        return self.patch.bit_length() - 1


def checked_sizes(values: Mapping[str, Any]) -> EncoderSizes:
    """EncoderSizes from a file's values. ModelError unless these are sizes of an encoder."""
    names = {field.name for field in fields(EncoderSizes)}
    if set(values) != names:
        raise ModelError(
            f"model.arch_options: vqvae: has {', '.join(map(str, values))}; expected "
            f"{', '.join(sorted(names))}"
        )
    check_counts("vqvae", **values)
    sizes = EncoderSizes(**values)
    if sizes.patch < 2 or sizes.patch & (sizes.patch - 1):
        raise ModelError(
            f"model.arch_options: vqvae: patch={sizes.patch}: the encoder halves the image, "
            "expected a power of two from 2"
        )
    return sizes


# ---------------------------------------------------------------- encoder and decoder


class Residual(nn.Module):
    """x + 1x1(relu(3x3(relu(x)))), without biases."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _residuals(sizes: EncoderSizes) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(sizes.residual_layers):
        layers.append(Residual(sizes.hiddens, sizes.residual_hiddens))
    return [*layers, nn.ReLU()]


class Encoder(nn.Sequential):
    """images [B, 3, H, W] -> codes before quantisation [B, code_dim, H / patch, W / patch]."""

    def __init__(self, sizes: EncoderSizes) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for k in range(sizes.halvings):
            is_last = k == sizes.halvings - 1
            wider = sizes.hiddens if is_last else max(1, sizes.hiddens // 2)
            layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), nn.ReLU()]
            channels = wider
        layers.append(nn.Conv2d(sizes.hiddens, sizes.hiddens, 3, padding=1))
        layers += _residuals(sizes)
        layers.append(nn.Conv2d(sizes.hiddens, sizes.code_dim, 1))
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """codes [B, code_dim, h, w] -> images [B, 3, patch * h, patch * w]."""

    def __init__(self, sizes: EncoderSizes) -> None:
        layers: list[nn.Module] = [nn.Conv2d(sizes.code_dim, sizes.hiddens, 3, padding=1)]
        layers += _residuals(sizes)
        channels = sizes.hiddens
        for k in range(sizes.halvings):
            is_last = k == sizes.halvings - 1
            fewer = 3 if is_last else max(1, sizes.hiddens // 2)
            layers.append(nn.ConvTranspose2d(channels, fewer, 4, stride=2, padding=1))
            if not is_last:
                layers.append(nn.ReLU())
            channels = fewer
        super().__init__(*layers)


# ---------------------------------------------------------------- codes


class Quantised(NamedTuple):
    """codes [B, D, h, w], whose gradient goes to the encoder unchanged; indices [B, h, w];
    commitment: mean squared distance of the encoder's outputs to their codes; perplexity: number of
    codes in use.
    """

    codes: Tensor
    indices: Tensor
    commitment: Tensor
    perplexity: Tensor


class Codebook(nn.Module):
    """`count` codes of width `dim`; in training mode they follow the mean of what they stand for.

    The moving averages have the decay `decay`. They are buffers: no optimizer sees them. A code
    that is hardly used restarts at a random output of the encoder (Dhariwal et al. 2020, arXiv
    2005.00341, section 3.1); so do all at the first step.
    """

    codes: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, count: int, dim: int, decay: float = DECAY) -> None:
        super().__init__()
        self.decay = decay
        codes = torch.randn(count, dim)
        self.register_buffer("codes", codes)
        self.register_buffer("usage", torch.zeros(count))
        self.register_buffer("sums", codes.clone())

    def forward(self, z: Tensor) -> Quantised:
        """z [B, D, h, w] -> the nearest code of every position."""
        vectors = z.detach().permute(0, 2, 3, 1).flatten(0, 2)  # [N, D]
        # |v - c|^2 without |v|^2, which does not change the order
        distances = self.codes.square().sum(dim=1) - 2 * vectors @ self.codes.T
        indices = distances.argmin(dim=1)
        batch, _, height, width = z.shape
        nearest = self.codes[indices].view(batch, height, width, -1).permute(0, 3, 1, 2)
        count = torch.bincount(indices, minlength=len(self.codes)).float()
        if self.training:
            self._follow(vectors, indices, count)
        share = count / count.sum()
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        return Quantised(
            z + (nearest - z).detach(),
            indices.view(batch, height, width),
            F.mse_loss(z, nearest.detach()),
            perplexity,
        )

    @torch.no_grad()
    def _follow(self, vectors: Tensor, indices: Tensor, count: Tensor) -> None:
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors.float())
        self.usage.lerp_(count, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        equal = len(vectors) / len(self.codes)  # usage if all codes were used equally often
        # Without restarts all images end with a few codes: at first the encoder's outputs are all
        # close to the same code, and the others never move.
        unused = self.usage < UNUSED * equal
        drawn = torch.randint(len(vectors), (len(self.codes),), device=vectors.device)
        restarted = vectors[drawn].float()
        self.usage.masked_fill_(unused, equal)
        self.sums.copy_(torch.where(unused[:, None], restarted * equal, self.sums))
        self.codes.copy_(self.sums / self.usage[:, None])


class Reconstruction(NamedTuple):
    """images [B, 3, H, W]; error: mean squared difference to the input; the rest as Quantised."""

    images: Tensor
    error: Tensor
    commitment: Tensor
    perplexity: Tensor


class VqVae(nn.Module):
    """Encoder, codes and decoder: normalised images [B, 3, H, W] -> Reconstruction."""

    def __init__(self, sizes: EncoderSizes, codes: int = 512, decay: float = DECAY) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.codebook = Codebook(codes, sizes.code_dim, decay)
        self.decoder = Decoder(sizes)

    def forward(self, images: Tensor) -> Reconstruction:
        quantised = self.codebook(self.encoder(images))
        decoded = self.decoder(quantised.codes)
        error = F.mse_loss(decoded, images)
        return Reconstruction(decoded, error, quantised.commitment, quantised.perplexity)


# ---------------------------------------------------------------- as tokens


class VqvaePatches(nn.Module):
    """A frozen encoder's outputs as tokens: images [B, 3, H, W] -> [B, N, dim].

    LayerNorm without parameters; a linear map where a code is not as wide as a token. The encoder's
    weights are buffers, so that neither an optimizer nor `model.freeze` reaches them, and it stays
    in eval mode. normalisation: mean and std of the images that the encoder was trained on.
    """

    def __init__(
        self,
        encoder: Encoder,
        sizes: EncoderSizes,
        dim: int,
        normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.normalisation = normalisation
        self.encoder = _without_parameters(encoder)
        self.norm = nn.LayerNorm(sizes.code_dim, elementwise_affine=False)
        same_width = sizes.code_dim == dim
        self.project = nn.Identity() if same_width else nn.Linear(sizes.code_dim, dim)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            codes = self.encoder(images)
        return self.project(self.norm(codes.flatten(2).transpose(1, 2)))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self


def _without_parameters(module: Encoder) -> Encoder:
    """Turn all parameters into buffers, in place."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module.eval()


# ---------------------------------------------------------------- files


class StoredEncoder(NamedTuple):
    """mean, std: of the images' normalisation."""

    encoder: Encoder
    sizes: EncoderSizes
    mean: tuple[float, ...]
    std: tuple[float, ...]


def save_vqvae(
    model: VqVae, path: str | Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Write a .safetensors file: weights, sizes, and the normalisation of the training images."""
    metadata = {"format": FORMAT, "sizes": asdict(model.sizes), "mean": mean, "std": std}
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, *tensor_files.encode(tensors, metadata))


def read_encoder(path: str | Path) -> StoredEncoder:
    """The encoder of a file of `save_vqvae`. ModelError names the file and what is wrong."""
    wrong = f"model.arch_options: vqvae={path}"
    if not Path(path).is_file():
        raise ModelError(f"{wrong}: no such file; `matryoshka vqvae` writes one")
    try:
        stored = tensor_files.read(path)
        metadata = stored.metadata
        if metadata is None or metadata.get("format") != FORMAT:
            raise ModelError(f"{wrong}: not a VQ-VAE; `matryoshka vqvae` writes one")
        state = stored.tensors("encoder.")
        sizes = _sizes_of(metadata, path)
        mean, std = _three(metadata["mean"]), _three(metadata["std"])
        with torch.device("meta"):  # a file may claim any size
            expected = {key: value.shape for key, value in Encoder(sizes).state_dict().items()}
        if expected != {key: value.shape for key, value in state.items()} or min(std) <= 0:
            raise ModelError(f"{wrong}: its weights do not fit its sizes; train it again")
    except ModelError:
        raise
    except (OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{wrong}: not a whole VQ-VAE file ({reason})") from None
    encoder = Encoder(sizes)
    if not any(value.is_meta for value in encoder.state_dict().values()):
        encoder.load_state_dict(state)
    return StoredEncoder(encoder, sizes, mean, std)


def _sizes_of(metadata: Mapping[str, Any], path: str | Path) -> EncoderSizes:
    values = metadata["sizes"]
    if not isinstance(values, dict):
        raise TypeError("its sizes are not names and values")
    try:
        return checked_sizes(values)
    except ModelError as error:
        raise ModelError(f"{error} ({path})") from None


def _three(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"expected three numbers, not {len(numbers)}")
    return numbers
