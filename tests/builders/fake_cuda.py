"""Training steps on a GPU that does not exist: fake tensors have its device, and no numbers.

What needs a real one is replaced: the backward pass gives every parameter a gradient, fused
optimizers are counted without being run (`_fused_sgd_` has no fake kernel), and events do nothing.
A fake tensor cannot be read, so that a wait for a number ends the test by an error.
"""

import contextlib
import importlib
from collections import Counter
from types import SimpleNamespace

import torch
from small_steps import SmallStep
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from matryoshka import nested
from matryoshka.data import augment

CUDA = torch.device("cuda", 0)
# They move no data: aten's views, and new tensors without a value.
FREE = [
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
]


# Steps are never freed: the process crashed in later blocks when fake tensors of a GPU were freed
# outside of their own (torch 2.15).
KEPT = []


class Launches(TorchDispatchMode):
    """Counts what would be launched, and copies between host and device.

    waits: copies for which the host waits. to_host: all copies to the host. counts: calls of each
    operation, a backward pass left out.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.waits = []
        self.to_host = 0

    @property
    def launched(self):
        return sum(n for name, n in self.counts.items() if name not in FREE)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if "::" not in name:  # not prim::device, profiler::...
            self.counts[name] += 1
        if name.startswith("_fused_"):
            return None
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_", "lift_fresh", "lift_fresh_copy"):
            source = args[-1] if name != "copy_" else args[1]
            source = source if isinstance(source, torch.Tensor) else args[0]
            self._note_copy(name, source, result, args, kwargs)
        return result

    def _note_copy(self, name, source, result, args, kwargs):
        asynchronous = kwargs.get("non_blocking", False) or (
            name == "copy_" and args[2:] == (True,)
        )
        if name.startswith("lift_fresh"):
            # torch.tensor(..., device="cuda"): made on the host, and copied there and then.
            if result.is_cuda:
                self.waits.append(name)
            return
        if source.device.type != result.device.type:
            self.to_host += not result.is_cuda
            if not asynchronous:
                self.waits.append(f"{name} to {result.device.type}")


class _Event:
    def __init__(self, **_):
        pass

    def record(self, stream=None):
        pass


@contextlib.contextmanager
def fake_cuda(monkeypatch):
    """Fake tensors may be on a GPU in this block."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    h200 = SimpleNamespace(L2_cache_size=60 * 2**20, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    # autocast and GradScaler ask whether there is a GPU; without one they switch themselves off.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.amp.autocast_mode.torch.cuda, "is_bf16_supported", lambda: True)
    # torch asks for its own types, before it takes one launch for many tensors.
    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        module = importlib.import_module(name)
        types = [*module._foreach_supported_types, FakeTensor]
        monkeypatch.setattr(module, "_foreach_supported_types", types)
    # Cached constants would belong to the mode of an earlier block, or stay fake after this one.
    caches = (augment._scale_and_shift, nested._inside)
    for cached in caches:
        cached.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    for cached in caches:
        cached.cache_clear()


class FakeStep(SmallStep):
    """A SmallStep in a `fake_cuda` block."""

    def __init__(self, monkeypatch, optimizer, **options):
        super().__init__(CUDA, optimizer, **options)

        def backward(loss, *_, **__):
            for p in self.model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        KEPT.append(self)

    def __call__(self):
        """One step; its launches."""
        with Launches() as launches:
            super().__call__()
        return launches
