"""Training steps on a GPU that does not exist: fake tensors have its device, and no numbers.

What needs a real one is replaced: the backward pass gives every parameter a gradient, fused
optimizers are counted without being run (`_fused_sgd_` has no fake kernel), and events do nothing.
A fake tensor cannot be read, so that a wait for a number ends the test by an error.
"""

import contextlib
import importlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from small_steps import SmallStep
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from matryoshka import nested
from matryoshka.data import augment
from matryoshka.data.augment import Preprocessing
from matryoshka.data.slots import Batch
from matryoshka.data.views import ViewOptions
from matryoshka.distributed import World
from matryoshka.evaluation.online_probe import OnlineProbe
from matryoshka.models import ModelSpec, build
from matryoshka.ssl import make_method
from matryoshka.ssl.options import SslConfig
from matryoshka.training import ssl_step
from matryoshka.training.compiling import Forward
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.optim import make_optimizer, parameter_groups
from matryoshka.training.state import TrainState
from matryoshka.training.sums import Sums

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
        give_gradients(monkeypatch, self.model)
        KEPT.append(self)

    def __call__(self):
        """One step; its launches."""
        with Launches() as launches:
            super().__call__()
        return launches


def give_gradients(monkeypatch, model):
    """Replace the backward pass, which would start CUDA: every parameter gets a gradient."""

    def backward(loss, *_, **__):
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None

    def grad(total, parameters):
        return [torch.empty_like(p) for p in parameters]

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", grad)


class FakeSslStep:
    """A step of self-supervised training, with a probe, in a `fake_cuda` block.

    options: of SslConfig. Calls return the step's launches.
    """

    def __init__(self, monkeypatch, **options):
        dims = (4, 8)
        self.config = SslConfig(**options, hidden=8, out=4, queue=16, directions=8)
        with CUDA:
            encoder = build(ModelSpec("fast_cnn", 3, dims, arch_options={"dim": 8}))
            method = make_method(encoder, self.config)
            learner = ssl_step.Learner(method, OnlineProbe(dims, 3))
        give_gradients(monkeypatch, learner)
        self.forward = Forward(ssl_step.Passes(method, Preprocessing(), "bf16"))
        self.guard = NonFiniteGuard(learner, CUDA)
        sums = {"loss": (), "prefix_loss": (len(dims),), "right": (len(dims),)}
        self.state = TrainState(
            model=learner,
            optimizer=make_optimizer("sgd", parameter_groups(learner, 0, 0), 0.1, 0.9, CUDA),
            loader=SimpleNamespace(batch_size=8),
            scaler=torch.amp.GradScaler("cuda", enabled=False),
            sums=Sums(sums, CUDA),
            metadata={},
        )
        numbers = torch.zeros(8, dtype=torch.int64, device=CUDA)
        pixels = [torch.zeros(8, 32, 32, 3, dtype=torch.uint8, device=CUDA)] * 2
        self.batch = Batch(pixels, numbers, numbers).with_host_index(np.arange(8))
        all_on = ViewOptions(
            flip=0.0,
            jitter=0.8,
            strengths=(0.4, 0.4, 0.2, 0.1),
            grey=0.2,
            blur=0.5,
            kernel=3,
            sigma=(0.1, 2.0),
            solarise=0.2,
        )
        self.views = ssl_step.ViewMaker([all_on] * 2, Preprocessing(), 0)
        KEPT.append(self)

    def __call__(self):
        cfg = SimpleNamespace(
            ssl=self.config,
            views=SimpleNamespace(count=2),
            training=SimpleNamespace(seed=3, batch_size=8),
        )
        with Launches() as launches:
            loss, norm, skipped, prefix_losses = ssl_step.train_step(
                self.batch,
                0.1,
                cfg=cfg,
                world=World(CUDA),
                forward=self.forward,
                state=self.state,
                guard=self.guard,
                views=self.views,
                momentum=0.9,
            )
            self.guard.after_step(0, loss, norm, skipped, prefix_losses=prefix_losses)
        self.state.loop.step += 1
        return launches
