"""How a device computes: kernels, precision, compilation."""

from __future__ import annotations

import contextlib
import os

import torch


class DeviceError(ValueError):
    """A device that cannot do what was asked for; the message names the option and the remedy."""

    user_error = True


def prepare(device: torch.device, seed: int, deterministic: bool) -> None:
    """Seed torch and select fast or deterministic kernels."""
    torch.manual_seed(seed)
    choose_kernels(device, deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS reads this variable at its first use and is not deterministic without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def choose_kernels(device: torch.device, deterministic: bool = False) -> None:
    """Let cuDNN measure which kernels are fastest, and float32 be float32.

    By default torch lets cuDNN round the factors of float32 convolutions to the 11 bits of TF32,
    which moves results by 1e-3 off those of a CPU, while matrix products keep all 24 bits. Who
    wants speed chooses bf16.
    """
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def why_not_compile(device: torch.device) -> str | None:
    """Try torch.compile on a small network, forward and backward; return the error, or None.

    The usual cause is a missing C++ compiler, missing Python headers or Triton, which would fail
    for every network.
    """
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).to(device)
    try:
        torch.compile(network)(torch.ones(2, 4, device=device)).sum().backward()
    except Exception as error:  # any kind: training also works without compilation
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"torch.compile fails: {(lines or [type(error).__name__])[0]}"
    finally:
        torch._dynamo.reset()
    return None


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve "auto": bf16 on a GPU that supports it, fp16 on older ones, fp32 on CPU and MPS.

    Raises DeviceError for fp16 on a CPU.
    """
    if name == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise DeviceError("precision=fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return name


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """torch.autocast for bf16 and fp16, a null context for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
