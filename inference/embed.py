"""Embed a data set: a folder of memory-mapped arrays with labels, names and a description.

    matryoshka embed --path model.safetensors --data train.beton --output embeddings/train
    matryoshka embed --path torchvision:resnet50 --data photos --output e --dtype float16
    torchrun --standalone --nproc-per-node=8 inference/embed.py --path ... --data ... --output ...

A killed run resumes when it is started again with the same options; the files are the same as
without interruption, for any number of processes. Several processes need one file system. Memory
use is independent of the data set's size, except for the list of file names. docs/retrieval.md
describes the files; `matryoshka.embeddings.open_embeddings` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from matryoshka import config
from matryoshka.evaluation.options import embed_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

from matryoshka import distributed
from matryoshka.checkpoint.adapter_file import add_adapter
from matryoshka.checkpoint.options import load_flags
from matryoshka.checkpoint.published import load_any
from matryoshka.data.sources import open_images
from matryoshka.evaluation.embedding import EmbeddingJob, EmbeddingOptions, embed
from matryoshka.evaluation.preprocessing import set_preprocessing
from matryoshka.models import NestedModel, widest


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    dataset = open_images(args.data)
    model = load(args)
    options = EmbeddingOptions(
        checkpoint=args.path,
        adapter=args.adapter,
        preprocessing=args.preprocessing,
        truncate_dim=args.truncate_dim,
        normalize=args.normalize,
        dtype=args.dtype,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    with distributed.joined(args.device) as world:
        job = EmbeddingJob(model, dataset, options, world=world)
        if world.is_main:
            print("\n".join(job.summary()))
        written = embed(job, args.output, report=print, overwrite=args.overwrite)
        if written and world.is_main:
            print(f"written  {args.output}")
    return 0


def load(args: SimpleNamespace) -> NestedModel:
    """The model of --path with the preprocessing and the adapter of the options."""
    model = widest(load_any(args.path, **load_flags(args)))
    set_preprocessing(model, args.preprocessing, args.resolution)
    if args.adapter:
        add_adapter(model, args.adapter, args.path)
    return model


if __name__ == "__main__":
    raise SystemExit(main())
