"""Options of the export of a model, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.checkpoint.options import AdapterOption, HeadOptions
from matryoshka.config import FlagParser, flat_parser, option
from matryoshka.config.limits import MAX_DIM, MAX_THREADS

FORMATS = ("onnx", "pt2", "torchscript", "int8")


class ExportError(ValueError):
    """A model or an option that cannot be exported; the message names it and the remedy."""

    user_error = True


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The model to export."""

    checkpoint: str = option(
        help="model.safetensors, a .pt or .pth of plain tensors, or a published baseline: "
        "torchvision:NAME[.WEIGHTS], timm:NAME",
        metavar="FILE",
        common=True,
        existing=True,
    )
    model_type: str | None = option(
        None,
        help="the architecture that the checkpoint must have, e.g. vit, cait, swin",
        flag="--model_type",
        metavar="NAME",
        common=True,
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The files to write, and what they contain."""

    output_dir: str = option(
        "exported_models",
        help="folder of the files, created if missing",
        flag="--output_dir",
        metavar="DIR",
        common=True,
        file_name=True,
    )
    format: tuple[str, ...] = option(
        ("onnx", "torchscript"),
        help="files to write; int8 is ONNX with 8-bit weights and activations",
        choices=FORMATS,
        nonempty=True,
        common=True,
    )
    truncate_dim: int | None = option(
        None,
        help="only the first D numbers of the embedding, the logits of prefixes up to D (with "
        "--adapter: of all), and the weights that these need",
        metavar="D",
        low=1,
        common=True,
        high=MAX_DIM,
    )
    with_preprocessing: bool = option(
        False, help="the files take uint8 [B, H, W, 3] and normalise it", common=True
    )
    img_size: int | None = option(
        None,
        help="pixels; unset: as the checkpoint says",
        flag="--img_size",
        low=1,
        high=8192,
        common=True,
    )
    batch_size: int = option(
        1,
        help="images of the example that is recorded, also verified and timed; the files take any "
        "number",
        flag="--batch_size",
        low=1,
        high=65536,
        common=True,
    )
    overwrite: bool = option(False, help="replace existing files", common=True)


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """Quantisation: `--format int8`."""

    calibration: str | None = option(
        None,
        help="int8: images (folder or .beton) whose activations set the ranges",
        metavar="DATA",
        common=True,
        existing=True,
    )
    calibration_images: int = option(
        256, help="int8: largest number of them, evenly spaced", low=1, high=65536
    )
    eval_data: str | None = option(
        None,
        help="int8: labelled images (folder of class folders or .beton), for the accuracy of "
        "every prefix before and after",
        metavar="DATA",
        common=True,
        existing=True,
    )


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Verification and latency of the written files."""

    verify: bool = option(
        False, help="compare every file with the model, at batch 1 and 7", common=True
    )
    images: str | None = option(
        None,
        help="--verify: folder or .beton of images; unset: the test images of the checkpoint's "
        "run where these are known, else noise",
        metavar="DATA",
        common=True,
        existing=True,
    )
    tolerance: float = option(
        1e-3,
        help="--verify: largest difference from a value v, in units of 1 + |v|; int8 has no limit",
        above=0,
        high=1e6,
    )
    no_latency: bool = option(False, help="do not measure the latency of the files")
    threads: int = option(
        0, help="of PyTorch and onnxruntime; 0: PyTorch's default", low=0, high=MAX_THREADS
    )


def export_parser() -> FlagParser:
    """The options of export_models.py."""
    return flat_parser(
        "export_models.py",
        "A model as files that run without this package: ONNX, torch.export, TorchScript, int8.\n\n"
        "    matryoshka export --checkpoint model.safetensors --verify --images photos\n"
        "    matryoshka export --checkpoint model.safetensors --format onnx --truncate-dim 64 "
        "--with-preprocessing\n"
        "    python export_models.py --checkpoint model.safetensors --model_type vit "
        "--output_dir exported_models\n\n"
        "Outputs of every file: `embedding` [B, D] and `logits` [G, B, C] of all prefixes; "
        "preprocessing, class names and prefixes are in its metadata. docs/export.md shows how to "
        "use the files.",
        SourceOptions,
        AdapterOption,
        ExportOptions,
        Int8Options,
        CheckOptions,
        HeadOptions,
    )
