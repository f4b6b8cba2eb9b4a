"""Options of the programs that evaluate a checkpoint, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matryoshka.checkpoint.options import AdapterOption, CheckpointOptions, HeadOptions
from matryoshka.config import FlagParser, flat_parser, option
from matryoshka.config.limits import MAX_COUNT, MAX_DIM, MAX_SEED
from matryoshka.runtime import DeviceOptions, RuntimeOptions

KINDS = ("logits", "softmax", "predictions", "gt")  # arrays that an evaluation saves
SCORES = ("logits", "softmax", "predictions")  # inputs of an analysis, in order of preference
PREPROCESSING = ("checkpoint", "upstream", "ffcv")
DTYPES = ("float32", "float16")  # of embeddings on disk
ANALYSES = ("cascade", "oracle", "superclasses", "trends", "calibration", "agreement", "widths")
CONFIDENCES = ("softmax", "entropy")
METHODS = ("linear", "1nn", "ncm", "svd", "svd-1nn", "rand-fs", "rand-lp")
# Methods of the protocol `frozen`; ncm and rand-lp are in both.
FROZEN_METHODS = (
    *("knn", "map", "lp", "ncm"),
    *("pca-knn", "pca-map", "pca-lp", "pca-ncm"),
    *("rand-knn", "rand-map", "rand-ncm", "rand-lp"),
    *("pixels-knn", "pixels-map", "pixels-ncm"),
)
PROTOCOLS = {"paper": METHODS, "frozen": FROZEN_METHODS}
FORMATS = ("png", "jpg")
CACHE = "data"  # folder of public data sets


def increasing(numbers: Sequence[int]) -> None:
    """ValueError unless every number is larger than the one before it."""
    if any(a >= b for a, b in pairwise(numbers)):
        raise ValueError("expected increasing numbers")


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """Resizing and cropping of images."""

    preprocessing: str = option(
        "checkpoint",
        help="upstream: shorter side resized to 256 by Pillow, central 224 pixels; ffcv: central "
        "crop of 224/256 of the shorter side, resized by area to the checkpoint's size; "
        "checkpoint: as the checkpoint says",
        choices=PREPROCESSING,
    )
    resolution: int | None = option(
        None, help="pixels; unset: as the checkpoint says", low=1, high=8192
    )


@dataclass(frozen=True, kw_only=True)
class ImagesOptions:
    """Images with or without classes."""

    data: tuple[str, ...] = option(
        help=".beton file, folder of class folders, folder of images without classes, or image "
        "files",
        metavar="PATH ...",
        words=True,
        nonempty=True,
        common=True,
        existing=True,
    )


# ---------------------------------------------------------------- eval


@dataclass(frozen=True, kw_only=True)
class EvaluationSetOptions:
    """The images of an evaluation; see evaluation_set.py."""

    dataset: str | None = option(
        None,
        help="V1 (the validation set of ImageNet-1K, or images of your own: --data-root), V2, A, "
        "R, Sketch or O; cifar10, cifar100, stl10, tiny-imagenet or hf:OWNER/NAME; a path of "
        "your own; unset: the "
        "test set of the model's run, else V1",
        file_name=True,
    )
    data_root: str | None = option(
        None,
        help="folder that holds the data set's folder (val, "
        "imagenetv2-matched-frequency-format-val, imagenet-a, imagenet-r or imagenet-r_, sketch; "
        "test or val); or itself a .beton file or a folder of class folders, such as another "
        "imagenetv2-*; unset: $IMAGENET_DIR, else upstream's ../../IMAGENET, and for cifar10 and "
        "the like a download",
        metavar="PATH",
        existing=True,
    )
    split: str | None = option(
        None,
        help="cifar10 and the like: the part to evaluate on; unset: test or val; of a run: test "
        "or validation",
    )
    cache: str | None = option(
        None,
        help=f"cifar10 and the like: folder of downloads; unset: {CACHE}",
        metavar="DIR",
        file_name=True,
    )


@dataclass(frozen=True, kw_only=True)
class EvalOptions(PreprocessingOptions, EvaluationSetOptions):
    """Inputs of an evaluation."""

    ood: str | None = option(
        None,
        help="images of none of the model's classes (a .beton, a folder of folders): how well "
        "confidence separates them from the data set; --dataset O does so for ImageNet-O",
        metavar="DATA",
        existing=True,
    )
    nesting_list: tuple[int, ...] | None = option(
        None,
        help="prefixes to evaluate: some of an MRL checkpoint's, or any lengths of an MRL-E "
        "checkpoint; unset: all",
        metavar="D,D,...",
        low=1,
        nonempty=True,
        high=MAX_DIM,
    )
    tta: bool = option(False, help="add the logits of the mirror image")


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """Outputs of an evaluation."""

    output: str | None = option(
        None,
        help="also write the table as JSON to this file; arrays go to its folder",
        file_name=True,
    )
    save_logits: bool = option(
        False, help="write logits to a .npy file, here or beside --output", flag="--save_logits"
    )
    save_softmax: bool = option(False, help="the same for the softmax", flag="--save_softmax")
    save_predictions: bool = option(
        False, help="the same for the predicted classes", flag="--save_predictions"
    )
    save_gt: bool = option(False, help="the same for the labels", flag="--save_gt")
    upstream_names: bool = option(
        False, help="--save_*: upstream's file names and .pth format", flag="--upstream_names"
    )
    retrieval: bool = option(
        False,
        help="write features instead, as upstream does: of queries and database of --dataset 1K, "
        "V2 or 4K",
    )
    retrieval_array_path: str = option(
        "",
        help="prefix of these files' names; a folder ends with /",
        flag="--retrieval_array_path",
        metavar="PREFIX",
        file_name=True,
    )
    random_sample_dim: int = option(
        4_202_000,
        help="--retrieval: largest number of images",
        flag="--random_sample_dim",
        low=1,
        high=MAX_COUNT,
    )


def eval_parser() -> FlagParser:
    """The options of pytorch_inference.py."""
    return flat_parser(
        "pytorch_inference.py",
        "Accuracy of every prefix of a checkpoint, all from one forward pass per image.\n\n"
        "    matryoshka eval --path model.safetensors --data-root val.beton\n"
        "    matryoshka eval --path final_weights.pt --mrl --dataset V1 --data-root imagenet\n"
        "    matryoshka eval --path torchvision:resnet50 --dataset R --save_predictions\n"
        "    matryoshka eval --path model.safetensors --dataset cifar10\n\n"
        "model.safetensors needs no further flag; upstream's .pt files take upstream's flags. Runs "
        "under torchrun, too: every image counts once. Saved arrays: logits and softmax, float32 "
        "[prefixes, images, classes]; predictions, int64 [prefixes, images]; labels (gt), int64 "
        "[images].",
        CheckpointOptions,
        EvalOptions,
        RuntimeOptions,
        SaveOptions,
        whole_help=True,  # users of the papers' repository look for its flags there
    )


# ---------------------------------------------------------------- embed


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(PreprocessingOptions, ImagesOptions):
    """Inputs and outputs of an embedding run."""

    output: str = option(
        help="folder of the embeddings, created if missing",
        metavar="DIR",
        common=True,
        file_name=True,
    )
    dtype: str = option(
        "float32", help="type of the embeddings on disk", choices=DTYPES, common=True
    )
    truncate_dim: int | None = option(
        None,
        help="only the first D dimensions of every embedding",
        metavar="D",
        low=1,
        common=True,
        high=MAX_DIM,
    )
    normalize: bool = option(False, help="scale to length 1, after truncation", common=True)
    overwrite: bool = option(
        False, help="replace other embeddings in DIR once the new ones are complete", common=True
    )


def embed_parser() -> FlagParser:
    """The options of embed.py."""
    return flat_parser(
        "embed.py",
        "Embeddings of a data set as memory-mapped arrays, with labels, names and provenance, in "
        "one folder.\n\n"
        "    matryoshka embed --path model.safetensors --data train.beton --output "
        "embeddings/train\n"
        "    torchrun --nproc-per-node=8 inference/embed.py --path model.safetensors \\\n"
        "        --data train.beton --output embeddings/train\n\n"
        "A killed run resumes when it is started again with the same options. "
        "docs/retrieval.md describes the files.",
        CheckpointOptions,
        AdapterOption,
        EmbedOptions,
        RuntimeOptions,
    )


# ---------------------------------------------------------------- gradcam


def _target(text: str) -> None:
    if text not in ("predicted", "label") and not text.isdecimal():
        raise ValueError("expected predicted, label, or the number of a class")


@dataclass(frozen=True, kw_only=True)
class GradcamOptions(ImagesOptions):
    """Images and classes to explain, and the pictures to write."""

    output: str = option(
        help="folder for the pictures, created if missing",
        metavar="DIR",
        common=True,
        file_name=True,
    )
    images: int = option(20, help="largest number of images", low=1, common=True, high=MAX_COUNT)
    dims: tuple[int, ...] | None = option(
        None,
        help="prefixes to show; unset: all of the checkpoint's",
        metavar="D,D,...",
        low=1,
        nonempty=True,
        common=True,
        high=MAX_DIM,
    )
    target: str = option(
        "predicted",
        help="class whose logit is explained: each prefix's own prediction, the true class, or a "
        "class index",
        metavar="predicted|label|INDEX",
        check=_target,
        common=True,
    )
    layer: str | None = option(
        None,
        help="module of the backbone that heat maps are made from, e.g. layer3; unset: the last "
        "one whose feature map has 6 x 6 positions or more",
    )
    format: str = option("png", help="format of the pictures", choices=FORMATS)


def gradcam_parser() -> FlagParser:
    """The options of gradcam.py."""
    return flat_parser(
        "gradcam.py",
        "Grad-CAM heat maps of every prefix of a checkpoint, one picture per image.\n\n"
        "    matryoshka gradcam --path model.safetensors --data val.beton --output maps\n"
        "    matryoshka gradcam --path torchvision:resnet50 --data photo.jpg --output maps "
        "--target 207\n\n"
        "Also writes gradcam.json, with the prediction and confidence of every prefix.",
        CheckpointOptions,
        GradcamOptions,
        DeviceOptions,
    )


# ---------------------------------------------------------------- baselines


@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """Methods, data and settings of the baselines."""

    path: str | None = option(
        None,
        help="model.safetensors, upstream's final_weights.pt, or a published baseline: "
        "torchvision:NAME[.WEIGHTS], timm:NAME; unset: the data are folders of embeddings",
        common=True,
        existing=True,
    )
    train_data: str = option(
        help="the database: a .beton file or a folder of class folders; without --path a folder "
        "of matryoshka embed",
        common=True,
        existing=True,
    )
    val_data: str = option(help="the queries", common=True, existing=True)
    protocol: str = option(
        "paper",
        help="paper: the MRL paper's baselines; frozen: kNN, mAP, linear probe and class means of "
        "the prefixes, of PCA, of random features and of pixels",
        choices=tuple(PROTOCOLS),
        common=True,
    )
    dims: tuple[int, ...] | None = option(
        None,
        help="e.g. 8,64,512; unset: the checkpoint's, or powers of two up to its one width",
        low=1,
        nonempty=True,
        check=increasing,
        common=True,
        high=MAX_DIM,
    )
    only: tuple[str, ...] | None = option(
        None,
        help="some of the methods; unset: all of the protocol",
        choices=tuple(dict.fromkeys((*METHODS, *FROZEN_METHODS))),
        nonempty=True,
        common=True,
    )
    shots: tuple[int, ...] = option(
        (1, 3, 5, 7, 9),
        help="ncm: images per class",
        low=1,
        nonempty=True,
        check=increasing,
        common=True,
        high=MAX_COUNT,
    )
    ways: int | None = option(
        None, help="ncm: classes in a draw; unset: all", low=2, high=MAX_COUNT
    )
    draws: int = option(5, help="number of random draws", low=1, high=9999)
    seed: int = option(0, help="seed of the draws", low=0, high=MAX_SEED)
    weight_decay: float = option(1e-4, help="weight decay of the probes", low=0, high=1e9)
    output: str = option(
        "baselines.json", help="file of the results, JSON", common=True, file_name=True
    )


def baselines_parser() -> FlagParser:
    """The options of baselines.py."""
    return flat_parser(
        "baselines.py",
        "The MRL paper's baselines for one checkpoint, from its features alone, without "
        "training.\n\n"
        "    matryoshka baselines --path model.safetensors --train-data train.beton "
        "--val-data val.beton\n\n"
        "linear: the checkpoint's own classifiers. 1nn: class of the nearest training image. ncm: "
        "nearest class mean. svd: the classifier cut to a rank. svd-1nn: 1nn on projections. "
        "rand-fs: 1nn on random features. rand-lp: a linear probe on random features.\n\n"
        "--protocol frozen, for encoders trained without labels; also from embeddings:\n\n"
        "    matryoshka baselines --protocol frozen --train-data EMB/train --val-data EMB/val\n\n"
        "knn: weighted vote of 20 and 200 neighbours. map: mAP@10. lp: a converged linear probe. "
        "ncm as above. pca-, rand-, pixels-: of PCA, random features, pixels of 32 x 32 copies.",
        BaselineOptions,
        HeadOptions,
        RuntimeOptions,
    )


# ---------------------------------------------------------------- analyze


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """Saved predictions, and the analyses of them."""

    results: str | None = option(
        None,
        help="results.json of an evaluation that saved arrays",
        metavar="FILE",
        common=True,
        existing=True,
    )
    logits: str | None = option(
        None,
        help="the array itself, .npy or upstream's .pth, in place of --results",
        metavar="FILE",
        existing=True,
    )
    softmax: str | None = option(None, help="the same for softmax", metavar="FILE", existing=True)
    predictions: str | None = option(
        None, help="the same for predicted classes", metavar="FILE", existing=True
    )
    gt: str | None = option(None, help="labels of that array", metavar="FILE", existing=True)
    dims: tuple[int, ...] | None = option(
        None, help="prefix lengths of that array", metavar="D,D,...", low=1, high=MAX_DIM
    )
    macs: tuple[int, ...] | None = option(
        None,
        help="multiply-adds of each of --dims, if each is a forward pass of its own; results.json "
        "has them",
        metavar="M,M,...",
        low=1,
        high=2**53,
    )
    validation: str | None = option(
        None,
        help="widths: results.json of the validation images that thresholds are chosen on; unset: "
        "a share of the images, see --learn",
        metavar="FILE",
        common=True,
        existing=True,
    )
    confidence: str = option(
        "softmax",
        help="widths: confidence of an answer, its softmax or 1 - entropy / log(classes)",
        choices=CONFIDENCES,
    )
    only: tuple[str, ...] = option(
        ANALYSES, help="some of the analyses", choices=ANALYSES, nonempty=True, common=True
    )
    splits: int = option(30, help="random splits of the images", low=1, common=True, high=100_000)
    learn: float = option(
        0.2, help="share of images to learn thresholds on", above=0, below=1, common=True
    )
    seed: int = option(0, help="seed of the splits", low=0, high=MAX_SEED)
    epsilon: tuple[float, ...] = option(
        (0.5, 1.0, 2.0),
        help="certified cascades: accuracy that may be lost, in percentage points",
        above=0,
        below=100,
        nonempty=True,
        common=True,
    )
    delta: float = option(
        0.05, help="certified cascades: probability of losing more", above=0, below=1, common=True
    )
    bins: int = option(15, help="bins of confidence", low=1, high=1000)  # Guo et al. 2017
    superclasses: str | None = option(
        None,
        help="paper (its 30 groups of ImageNet-1K, the default), a number of groups, depth:N below "
        '"entity", or names: dog,bird',
        metavar="LEVEL",
        common=True,
    )
    output: str | None = option(
        None,
        help="file to write; unset: analysis.json beside the results, else here",
        common=True,
        file_name=True,
    )


def analyze_parser() -> FlagParser:
    """The options of analyze.py."""
    return flat_parser(
        "analyze.py",
        "Analyses of the saved predictions of all prefixes: cascades, oracle, superclasses, "
        "trends, calibration, agreement.\n\n"
        "    matryoshka eval --path model.safetensors --data-root val.beton --save_logits "
        "--save_gt --output out/results.json\n"
        "    matryoshka analyze --results out/results.json\n\n"
        "Needs labels (gt) and logits or softmax; predictions alone are enough for oracle, trends, "
        "agreement and superclasses.",
        AnalyzeOptions,
    )
