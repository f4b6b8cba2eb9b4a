"""A training step of a small nested model: everything that train_step wants, on any device."""

from functools import partial
from types import SimpleNamespace

import torch

from matryoshka.data.augment import Preprocessing
from matryoshka.data.slots import Batch
from matryoshka.distributed import World
from matryoshka.models import ModelSpec, build
from matryoshka.models.ema import Ema
from matryoshka.nested import nested_cross_entropy
from matryoshka.training.compiling import compile_step
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.optim import make_optimizer, parameter_groups
from matryoshka.training.options import DataConfig
from matryoshka.training.state import TrainState
from matryoshka.training.sums import Sums
from matryoshka.training.supervised_step import Objective, train_step


class SmallStep:
    """Calls are steps on `batch`, 8 images of `size` pixels. The fixed feature is dims=(8,).

    part: images of a forward pass. data: options of DataConfig. how: of compile_step. loss: has
    the signature of nested_cross_entropy.
    """

    def __init__(
        self,
        device,
        optimizer,
        *,
        precision="bf16",
        ema=False,
        arch="fast_cnn",
        dims=(4, 8),
        shared=False,
        size=32,
        part=8,
        data=None,
        how=None,
        loss=nested_cross_entropy,
    ):
        torch.manual_seed(0)
        options = {"dim": 8} if arch == "fast_cnn" else {}
        spec = ModelSpec(arch, 10, dims, efficient=shared, arch_options=options)
        self.device = device
        with device:  # not `.to(device)`, which fake tensors do not support
            self.model = build(spec)
        self.model.preprocessing = Preprocessing(size=size)
        self.guard = NonFiniteGuard(self.model, device)
        groups = parameter_groups(self.model, 1e-4, 0.0)
        self.state = TrainState(
            model=self.model,
            optimizer=make_optimizer(optimizer, groups, 0.1, 0.9, device),
            loader=SimpleNamespace(batch_size=8),
            scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
            sums=Sums({"loss": (), "prefix_loss": (len(dims),)}, device),
            metadata={},
            ema=Ema(self.model, 0.9) if ema else None,
        )
        self.objective = Objective(
            self.model, partial(loss, label_smoothing=0.1), weights=None, precision=precision
        )
        self.forward = compile_step(self.objective, how, sizes={part})
        # Made on the host: the same numbers on every device.
        images = torch.randint(256, (8, size, size, 3), dtype=torch.uint8, device="cpu")
        labels = torch.arange(8, device="cpu")
        self.batch = Batch(images.to(device), labels.to(device), labels.to(device))
        training = SimpleNamespace(seed=0, batch_size=part, sandwich=None)
        self.cfg = SimpleNamespace(data=DataConfig(**(data or {})), training=training)

    def __call__(self):
        """One step; the reports that have arrived."""
        loss, norm, skipped = train_step(
            self.batch,
            0.05,
            cfg=self.cfg,
            world=World(self.device),
            forward=self.forward,
            state=self.state,
            guard=self.guard,
        )
        reports = self.guard.after_step(self.state.loop.step, loss, norm, skipped)
        self.state.loop.step += 1
        return reports
