"""Files of torch.save, read without running the code that a pickle may hold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka import tensor_files
from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.files import check_regular


def load_plain(path: Path) -> Any:
    """The tensors, containers, numbers and strings of a file, on the CPU.

    weights_only: a pickle that needs more than that is refused, because it could run code.
    CheckpointError for it, and for a file that cannot be read.
    """
    try:
        if tensor_files.is_safetensors(path):
            # torch.load reads these, too (2.15), and takes no notice of our checksums.
            raise CheckpointError(f"{path}: a safetensors file, not one of torch.save")
        with warnings.catch_warnings():  # torch warns of plain pickles before it refuses them
            warnings.simplefilter("ignore")
            check_regular(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:
        # Damaged files make the unpickler raise nearly any type. torch's own message is dropped:
        # it advises to run the file's code.
        raise CheckpointError(
            f"{path}: not a checkpoint of plain tensors (an HTML page? a pickle that would run "
            "code? truncated?); give a state_dict that torch.save wrote, or a model.safetensors"
        ) from None


def is_whole(tensor: Tensor) -> bool:
    """Whether the file holds all bytes of a tensor: a small file can claim any shape."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )
