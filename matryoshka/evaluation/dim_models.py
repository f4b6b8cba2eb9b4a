"""Model files whose dims are compared: a nested model, or exports with one dim each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matryoshka.checkpoint.published import PREFIXES, load_any
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.config import ConfigError
from matryoshka.evaluation.preprocessing import set_preprocessing
from matryoshka.models import NestedModel

EXPORTS = (".safetensors", ".pth")  # the first is preferred where both exist


@dataclass(frozen=True)
class DimModel:
    """A loaded model and its file; its dims are compared with each other and with other files'."""

    path: str
    model: NestedModel


def load_dim_models(names: Sequence[str], resolution: int | None = None) -> list[DimModel]:
    """Load the models that `names` mean, on the CPU, the smallest dim first.

    names: model files, published models, run folders, or folders of exports. resolution: pixels of
    a side, in place of the checkpoints'. ConfigError unless each dim has one model, and all models
    the same classes and image size.
    """
    models = []
    for path in _files(names):
        model = load_any(path)
        set_preprocessing(model, "checkpoint", resolution)
        models.append(DimModel(path, model))
    models.sort(key=lambda each: each.model.dims)

    owners: dict[int, str] = {}
    for each in models:
        for dim in each.model.dims:
            if dim in owners:
                raise ConfigError(
                    f"--path: {owners[dim]} and {each.path} both have dim {dim}; give one of them"
                )
            owners[dim] = each.path
        if _task(each.model) != _task(models[0].model):
            raise ConfigError(
                f"--path: {models[0].path} and {each.path} differ in their classes or image size; "
                "compare models of the same data"
            )
    return models


def _files(names: Sequence[str]) -> list[str]:
    """The model files that are named, or that lie in a folder."""
    files = []
    for name in names:
        folder = Path(name)
        if name.startswith(PREFIXES) or not folder.is_dir():
            files.append(name)
        elif (folder / FINAL).exists():
            files.append(str(folder / FINAL))
        else:
            found = _exports(folder)
            if not found:
                raise ConfigError(
                    f"--path {name}: has no {FINAL} and no exports ({', '.join(EXPORTS)}); give a "
                    "run folder, a folder of exports, or a model file"
                )
            files += found
    return files


def _exports(folder: Path) -> list[str]:
    """The model files of a folder; of two with the same name, that with the first ending."""
    by_name: dict[str, Path] = {}
    for ending in EXPORTS:
        for path in sorted(folder.glob(f"*{ending}")):
            by_name.setdefault(path.stem, path)
    return [str(by_name[name]) for name in sorted(by_name)]


def _task(model: NestedModel) -> tuple:
    return model.spec.num_classes, model.preprocessing.size, model.preprocessing.ratio
