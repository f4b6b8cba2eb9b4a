"""A data set through a model: embeddings as memory-mapped arrays, labels, names and what made them,
in one folder.

    matryoshka embed --path runs/demo/mrl/model.safetensors --data train.beton --output
    embeddings/train matryoshka embed --path torchvision:resnet50 --data photos --output
    embeddings/photos --dtype float16 torchrun --standalone --nproc-per-node=8 inference/embed.py
    --path final_weights.pt --mrl --data ... --output ...

Killed at any moment and started again with the same options, it goes on where it was; the files are
the same in the end, also for another number of processes. Nothing of the data set's size is held in
memory but its list of images. Several processes need one file system. docs/retrieval.md describes
the files; `matryoshka.embeddings.open_embeddings` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka import config, distributed
from matryoshka.data import open_dataset
from matryoshka.evaluation.embedding import Job, check, embed, load
from matryoshka.evaluation.options import embed_parser as parser


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    dataset = open_dataset(args.data)
    model = load(args)
    with distributed.joined(args.device) as world:
        job = Job(model, dataset, dataset.labels, args, world, print)
        job.announce()
        if embed(job, args.output, args.overwrite) and world.is_main:
            print(f"written  {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
