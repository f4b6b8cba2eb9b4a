"""Benchmark of exhaustive and funnel search on a GPU: recall of the exact neighbours, queries/s.

    python bench/retrieval_device.py [--device cuda] [--rows 1280000] [--queries 50000]

Nested embeddings like those of nested_rows.py, made on the device; the ground truth is float32
search of all dimensions, for 2,000 of the queries. Every search takes all queries; the speed is the
median of 3 turns after a warm-up.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import numpy as np
import torch
from record import append, spread

from matryoshka.retrieval import SearchParams, Stage
from matryoshka.retrieval.device import DeviceSearcher
from matryoshka.retrieval.ranking_metrics import recall_against_exact, summarise_recall

WIDTH = 2048
K = 10
SEARCHES = (
    SearchParams("exact", WIDTH, 40, (Stage(WIDTH, K),)),
    SearchParams("exact", 64, 200, (Stage(WIDTH, K),)),
    SearchParams("exact", 64, 200, (Stage(256, 40), Stage(WIDTH, K))),
    SearchParams("exact", 32, 400, (Stage(256, 40), Stage(WIDTH, K))),
    SearchParams("exact", 16, 200, (Stage(WIDTH, K),)),
    SearchParams.funnel("exact", [16, 32, 64, 128, 256, 2048], [200, 100, 50, 25, 10]),
)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cuda")
    p.add_argument("--rows", type=int, default=1_280_000)
    p.add_argument("--queries", type=int, default=50_000)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)

    # ---- data and ground truth ----
    torch.manual_seed(0)
    make = maker(torch.device(args.device))
    rows = np.concatenate([make(min(20_000, args.rows - i)) for i in range(0, args.rows, 20_000)])
    queries = np.concatenate(
        [make(min(20_000, args.queries - i)) for i in range(0, args.queries, 20_000)]
    )
    queries = queries.astype(np.float32)
    exact = DeviceSearcher(rows.astype(np.float32), args.device)
    truth = exact.search(queries[:2000], SearchParams("exact", WIDTH, K)).ids
    del exact  # 10 GB of device memory

    # ---- searches ----
    searcher = DeviceSearcher(rows, args.device)
    for params in SEARCHES:
        rates = []
        ids = truth
        for turn in range(args.turns + 1):
            started = time.perf_counter()
            ids = searcher.search(queries, params).ids  # on the CPU, so all work is done
            if turn:
                rates.append(len(queries) / (time.perf_counter() - started))
        recall = summarise_recall(recall_against_exact(ids[: len(truth)], truth), K)
        print(
            f"{params!s:50} recall@10 {recall.mean:.4f} (at least {recall.lower:.4f})  "
            f"{median(rates):,.0f} q/s",
            flush=True,
        )
        row = {
            "case": str(params),
            "device": args.device,
            "rows": args.rows,
            "queries": args.queries,
            "recall": recall.mean,
            "lower": recall.lower,
            "q/s": spread(rates),
        }
        if not args.no_record:
            append("retrieval_device", [row])
    return 0


def maker(device: torch.device):
    """A function n -> float16 [n, 2048] on the CPU: parents, classes, uneven sub-clusters,
    log-normal noise.
    """
    scale = (1 + torch.arange(WIDTH, device=device) / 16) ** -0.6
    parents = torch.randn(50, WIDTH, device=device)
    classes = parents[torch.randint(50, (1000,), device=device)] + 0.8 * torch.randn(
        1000, WIDTH, device=device
    )
    offsets = torch.randn(64_000, WIDTH, device=device, dtype=torch.float32).half()
    share = torch.distributions.Dirichlet(torch.full((1000, 64), 0.7)).sample().cumsum(1).to(device)

    def make(n: int) -> np.ndarray:
        c = torch.randint(1000, (n,), device=device)
        sub = (torch.rand(n, 1, device=device) > share[c]).sum(1).clamp(max=63)
        noise = torch.exp(-0.7 + 0.4 * torch.randn(n, 1, device=device)) * torch.randn(
            n, WIDTH, device=device
        )
        raw = classes[c] + 0.5 * offsets[c * 64 + sub] + noise
        return torch.nn.functional.softplus((raw * scale).clamp(-20, 20)).half().cpu().numpy()

    return make


if __name__ == "__main__":
    sys.exit(main())
