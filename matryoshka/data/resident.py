"""Small sets, decoded once: uint8 on the device, where crops and flips are batched operations.

    loader = ResidentLoader("cifar.beton", 512, order="random", image=PadCrop(32), device="cuda")

The same batches as Loader: order, crops, labels, state. Pixels may differ by one level
(augment.resized_crops), and by more where Loader decodes a JPEG inexactly for training (crops.py):
here every image is decoded exactly.
"""

from __future__ import annotations

import numpy as np
import torch

from matryoshka.data.augment import resized_crops, shifted
from matryoshka.data.crops import Crop, PadCrop, whole_images
from matryoshka.data.layout import BetonError
from matryoshka.data.loader import Loader, Produced, Skipped
from matryoshka.data.slots import Batch

_CHUNK = 1024  # images decoded at a time


class ResidentLoader(Loader):
    """A Loader whose images lie on its device, all of one size. Arguments and use are those of
    Loader.

    Every rank holds the whole set: count x height x width x 3 bytes. BetonError when the images
    differ in size or do not fit into the device's memory; and, where on_error is "error", by the
    constructor for an image that cannot be decoded.
    """

    def __init__(self, path, batch_size: int, **options) -> None:
        super().__init__(path, batch_size, **options)
        self._broken: dict[int, Skipped] = {}
        self._decode_all()
        self._labels = torch.from_numpy(self.dataset.labels).to(self.device)

    def _decode_all(self) -> None:
        n = len(self.dataset)
        chunks = [np.arange(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK)]
        feed, unreadable = self._feed(chunks)
        shape = None
        try:
            for k, indices in enumerate(chunks):
                samples = feed.fetch(k)
                width, height = samples.width, samples.height
                readable = np.array([int(i) not in unreadable for i in indices])
                if shape is None and readable.any():
                    first = int(readable.argmax())
                    shape = int(height[first]), int(width[first])
                    self._images = self._allocate(n, *shape)
                if shape is None:
                    raise BetonError(
                        f"{self.dataset.path}: none of the first {len(indices)} images can be read"
                    )
                other = readable & ((height != shape[0]) | (width != shape[1]))
                if other.any():
                    b = int(other.argmax())
                    raise BetonError(
                        f"{self.dataset.path}: {self.dataset.name(int(indices[b]))} has "
                        f"{width[b]}x{height[b]} pixels, "
                        f"others have {shape[1]}x{shape[0]}: a resident set needs images of one "
                        "size; "
                        "write them so, or leave out data.resident"
                    )
                pixels = np.empty((len(indices), *shape, 3), np.uint8)
                status = self._decode(samples, whole_images(width, height), pixels)
                feed.release(k)
                for skipped in self._failed(indices, status, unreadable):
                    self._broken[skipped.index] = skipped
                self._images[indices[0] : indices[-1] + 1] = torch.from_numpy(pixels).to(
                    self.device
                )
        finally:
            feed.close()

    def _allocate(self, n: int, height: int, width: int) -> torch.Tensor:
        try:
            return torch.empty(n, height, width, 3, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:  # of which torch.OutOfMemoryError is one
            size = 3 * n * height * width / 2**30
            raise BetonError(
                f"{self.dataset.path}: its {n} images of {width}x{height} need {size:.1f} GiB on "
                f"{self.device}, which "
                "has less; leave out data.resident"
            ) from error

    def _produce(self, shares: list[tuple[int, np.ndarray]], epoch: int, image: Crop) -> Produced:
        height, width = self._images.shape[1:3]
        for k, share in shares:
            skipped = (
                [self._broken[i] for i in share.tolist() if i in self._broken]
                if self._broken
                else []
            )
            good = (
                np.array([i not in self._broken for i in share.tolist()])
                if skipped
                else slice(None)
            )
            indices = share[good].copy()
            index = torch.from_numpy(indices).to(self.device, non_blocking=True)
            sides = np.full(len(indices), width, np.int32), np.full(len(indices), height, np.int32)
            images = self._images[index]
            crops = image.crops(*sides, indices, self.seed, epoch)
            whole = (height, width) == (image.size, image.size)
            if not (isinstance(image, PadCrop) and whole):
                images = resized_crops(images, self._on_device(crops), image.size)
            if isinstance(image, PadCrop):
                windows = image.windows(indices, self.seed, epoch)
                images = shifted(images, self._on_device(windows), image.padding)
            yield k, Batch(images, self._labels[index], index), skipped

    def _on_device(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows).to(self.device, non_blocking=True)
