"""Options of processes, devices and threads, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.config import option
from matryoshka.config.limits import MAX_PROCESSES, MAX_THREADS

DEVICES = ("auto", "cuda", "mps", "cpu")
BACKENDS = ("auto", "nccl", "gloo")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Device of a model."""

    device: str = option(
        "auto", help="auto: CUDA, else MPS, else CPU", choices=DEVICES, common=True
    )


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(DeviceOptions):
    """Device, threads, batch size and precision of a pass over a data set."""

    workers: int = option(
        0, help="decoding threads per process; 0: all cores", low=0, high=MAX_THREADS, common=True
    )
    batch_size: int = option(256, help="images per process", low=1, high=65536, common=True)
    precision: str = option(
        "fp32",
        help="precision of the backbone; fp32: without TF32; auto: bf16 or fp16 on CUDA, else fp32",
        choices=PRECISIONS,
    )


@dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """Threads of the retrieval kernels."""

    threads: int = option(0, help="0: all cores", low=0, high=MAX_THREADS)


@dataclass(frozen=True)
class DistConfig:
    """Section `dist`: all but the backend is used only with training.distributed=1 and without
    torchrun, whose environment wins.
    """

    world_size: int = option(
        0,
        help="processes to start; 0: one for each visible GPU or MIG slice, else 1",
        low=0,
        affects_result=False,
        high=MAX_PROCESSES,
    )
    address: str = option("localhost", help="rendezvous host", affects_result=False)
    port: int = option(
        0, help="rendezvous port; 0: any free one", low=0, high=65535, affects_result=False
    )
    backend: str = option(
        "auto",
        help="carries gradients; auto: nccl on GPUs, gloo on CPUs and on MIG slices",
        choices=BACKENDS,
        affects_result=False,
    )
