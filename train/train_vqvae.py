"""A VQ-VAE on small images: its encoder makes the tokens of the transformer vitfixedposvqvae.

    python train_vqvae.py --data.train_dataset=train.beton --output.path=vqvae.safetensors

Every log_every updates it prints the mean squared error of the reconstruction (normalised pixels),
the mean squared distance to the codes, and the perplexity: the number of codes in use, if all were
used equally often. Runs as one process; the file appears when the training is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from matryoshka import config
from matryoshka.training.vqvae_options import parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import torch
from torch import Tensor

from matryoshka import devices, distributed
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.data.augment import normalise
from matryoshka.models.vqvae import EncoderSizes, VqVae, save_vqvae


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    cfg = parser().parse_args(argv)
    m = cfg.model
    if cfg.data.size % m.patch:
        raise config.ConfigError(
            f"data.size={cfg.data.size}: not a multiple of model.patch={m.patch}"
        )
    device = distributed.pick_device(cfg.training.device, 0)
    devices.choose_kernels(device)
    train_set = open_dataset(cfg.data.train_dataset)
    val_set = open_dataset(cfg.data.val_dataset) if cfg.data.val_dataset else train_set
    for dataset in (train_set, val_set):
        if not len(dataset):
            raise config.ConfigError(f"{dataset.path}: contains no images")
    # Before hours of work: a folder that cannot be created ends the program now.
    Path(cfg.output.path).parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(cfg.training.seed)
    sizes = EncoderSizes(
        patch=m.patch,
        hiddens=m.hiddens,
        residual_hiddens=m.residual_hiddens,
        residual_layers=m.residual_layers,
        code_dim=m.code_dim,
    )
    model = VqVae(sizes, codes=m.codes, decay=m.decay)
    model = model.to(device).to(memory_format=torch.channels_last)
    count = sum(p.numel() for p in model.parameters())
    side = cfg.data.size // m.patch
    print(
        f"vqvae    {count:,} parameters, {m.codes} codes of {m.code_dim}; {side} x {side} codes "
        f"for an image of {cfg.data.size} pixels"
    )
    print(f"data     {len(train_set):,} images", flush=True)
    train(model, train_set, cfg, device)
    error, perplexity = evaluate(model, val_set, cfg, device)
    check_finite(error, cfg.training.lr)
    name = "validation" if cfg.data.val_dataset else "training"
    print(f"{name} set: error {error:.4f}  perplexity {perplexity:.1f}")
    save_vqvae(model, cfg.output.path, tuple(cfg.data.mean), tuple(cfg.data.std))
    print(f"model    {cfg.output.path}: model.arch_options=vqvae={cfg.output.path}")
    return 0


def train(model: VqVae, dataset, cfg: SimpleNamespace, device: torch.device) -> None:
    """Adam on error + commitment * distance, for training.steps updates."""
    t = cfg.training
    optimizer = torch.optim.Adam(model.parameters(), lr=t.lr)
    model.train()
    # On the device: reading a number would make every step wait.
    sums = torch.zeros(3, device=device)
    began, since = time.perf_counter(), 0
    for step, images in enumerate(training_images(dataset, cfg, device), 1):
        result = model(images)
        optimizer.zero_grad(set_to_none=True)
        (result.error + cfg.model.commitment * result.commitment).backward()
        optimizer.step()
        sums += torch.stack([result.error, result.commitment, result.perplexity]).detach()
        since += 1
        if step % t.log_every == 0 or step == t.steps:
            error, distance, perplexity = (sums / since).tolist()
            check_finite(error, t.lr)
            rate = since * t.batch_size / (time.perf_counter() - began)
            print(
                f"step {step:6d}  error {error:.4f}  distance {distance:.4f}  "
                f"perplexity {perplexity:.1f}  {rate:.0f} images/s",
                flush=True,
            )
            sums.zero_()
            began, since = time.perf_counter(), 0
        if step == t.steps:
            return


def check_finite(error: float, lr: float) -> None:
    """Raise ConfigError if the error is NaN or infinity."""
    if not math.isfinite(error):
        raise config.ConfigError(f"training.lr={lr}: the loss is not finite any more; lower it")


def training_images(dataset, cfg: SimpleNamespace, device: torch.device) -> Iterator[Tensor]:
    """Normalised images [B, 3, size, size], epoch after epoch, without end."""
    batch_size = min(cfg.training.batch_size, len(dataset))
    loader = _loader(dataset, batch_size, cfg, device, order="random", drop_last=True)
    while True:
        for batch in loader:
            yield normalise(batch.images, tuple(cfg.data.mean), tuple(cfg.data.std))


@torch.no_grad()
def evaluate(
    model: VqVae, dataset, cfg: SimpleNamespace, device: torch.device
) -> tuple[float, float]:
    """(mean squared error, perplexity over the whole set)."""
    model.eval()
    loader = _loader(dataset, cfg.training.batch_size, cfg, device, order="sequential")
    total = torch.zeros((), device=device)
    count = torch.zeros(cfg.model.codes, device=device)
    for batch in loader:
        images = normalise(batch.images, tuple(cfg.data.mean), tuple(cfg.data.std))
        quantised = model.codebook(model.encoder(images))
        total += (model.decoder(quantised.codes) - images).square().mean() * len(images)
        count += torch.bincount(quantised.indices.flatten(), minlength=cfg.model.codes)
    share = count / count.sum()
    perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
    return float(total) / len(dataset), float(perplexity)


def _loader(
    dataset, batch_size: int, cfg: SimpleNamespace, device: torch.device, **options
) -> Loader:
    return Loader(
        dataset,
        batch_size,
        crop=CenterCrop(cfg.data.size, 1.0),
        num_workers=cfg.data.num_workers,
        device=device,
        seed=cfg.training.seed,
        **options,
    )


if __name__ == "__main__":
    raise SystemExit(main())
