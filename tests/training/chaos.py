"""Kill training runs with SIGKILL repeatedly; compare their results with an undisturbed run.

    python tests/training/chaos.py --kills 200            # half of them with two processes

Each run restarts until it finishes, as under torchrun. The weights, optimizer, RNG and progress of
its last checkpoint must have the sha256 of the uninterrupted run, and its log must have the same
lines. A process is killed at a random time, inside a step, an all-reduce or an evaluation, or at a
write, fsync, link or rename of a checkpoint. Children are forks of this process, which has imported
everything: a restart takes one second instead of ten.

While a run lives that will be killed, a rival starts at a random time with the same run id and
`--training.resume=auto`. It must be refused in one line; a rival that comes after the kill finds
the folder free, and leaves it at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from matryoshka.train import train_imagenet
from sklearn.datasets import load_digits

import matryoshka.evaluation.accuracy
from matryoshka.data import write_beton
from matryoshka.training import session, snapshot
from matryoshka.training.guard import NonFiniteGuard

PLACES = ("anywhere", "step", "all-reduce", "evaluation", "write", "fsync", "link", "rename")
EPOCHS, TRAIN, VAL = 2, 130, 30
REFUSED, FREE, TWO_OWNERS = 2, 77, 78  # statuses of a rival


class Digits:
    """Handwritten digits as PNG-free images of 32 pixels: a source for write_beton."""

    def __init__(self, first: int, count: int) -> None:
        data = load_digits()
        self.pixels = (
            (data.images[first : first + count] * 15.9).astype("uint8").repeat(4, 1).repeat(4, 2)
        )
        self.labels, self.classes = data.target[first : first + count], [str(i) for i in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{index}.pgm"

    def read(self, index: int) -> bytes:
        return b"P5 32 32 255\n" + self.pixels[index].tobytes()


def options(folder: Path, run_id: str) -> list[str]:
    return [
        f"--data.train_dataset={folder / 'train.beton'}",
        f"--data.val_dataset={folder / 'val.beton'}",
        f"--logging.folder={folder / 'runs'}",
        f"--logging.run_id={run_id}",
        "--model.arch=resnet10",
        "--model.mrl=1",
        "--model.dims=8,64,512",
        f"--training.epochs={EPOCHS}",
        "--training.global_batch_size=16",
        "--training.batch_size=16",
        "--resolution.min_res=32",
        "--resolution.max_res=32",
        "--validation.resolution=32",
        "--validation.lr_tta=0",
        "--data.num_workers=1",
        "--training.ema=0.9",
        "--training.checkpoint_every_steps=2",
        "--training.hang_timeout=120",
        "--data.mixup=0.2",
    ]


# ---------------------------------------------------------------- a process


def killed_at(place: str, count: int, delay: float) -> None:
    """Arrange that this process is killed at the `count`-th call at a place, or after `delay` s."""

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "anywhere":
        timer = threading.Timer(delay, end)
        timer.daemon = True
        timer.start()
        return
    left = [count]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def wrap(owner, name: str, half=None) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if due():
                if half is not None:
                    half(original, *args)
                end()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def half_of_it(write, descriptor: int, data) -> None:
        write(descriptor, bytes(data)[: len(data) // 2])

    if place == "step":
        wrap(NonFiniteGuard, "before_step")
    elif place == "all-reduce":
        wrap(
            torch.distributed,
            "all_reduce",
            lambda reduce, tensor, *_: reduce(tensor, async_op=True),
        )
    elif place == "evaluation":
        wrap(matryoshka.evaluation.accuracy.PrefixAccuracy, "update")
    else:
        names = {"write": "write", "fsync": "fsync", "link": "link", "rename": "replace"}
        wrap(os, names[place], half_of_it if place == "write" else None)


def child(
    argv: list[str],
    *,
    rank: int,
    ranks: int,
    port: int,
    attempt: int,
    out: Path,
    fate: tuple | None,
) -> None:
    """One process of a run; never returns."""
    code = 70
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "chaos",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }
        if fate is not None:
            killed_at(*fate)
        code = train_imagenet.main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def rival(argv: list[str], run_folder: Path, owner: int, delay: float, out: Path) -> int:
    """Fork a second start of a run whose rank 0 is the process `owner`; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        time.sleep(delay)
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        resolve_run = session.resolve_run

        def resolved(*args, **kwargs):
            resolve_run(*args, **kwargs)
            # The folder is this process's own: no other may have a file of its log open.
            os._exit(TWO_OWNERS if has_open(owner, run_folder / "events.jsonl") else FREE)

        session.resolve_run = resolved
        code = train_imagenet.main([*argv, "--training.resume=auto"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open; False if it has ended."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for name in names:
        try:
            if os.readlink(f"/proc/{pid}/fd/{name}") == str(path):
                return True
        except OSError:
            continue
    return False


def check_rival(code: int, out: Path) -> str:
    """What became of a rival: refused or late."""
    said = out.read_text() if out.exists() else ""
    if code == REFUSED and said.count("\n") == 1 and "in use by process" in said:
        return "refused"
    if code == FREE:
        return "late"
    raise SystemExit(f"a rival ended with status {code}:\n{said[-3000:]}")


# ---------------------------------------------------------------- a run


def run(
    folder: Path, run_id: str, *, ranks: int, kills: int, rng: random.Random, seconds: float
) -> tuple[Counter, Counter, float]:
    """One run with `kills` kills; (where it was killed, what became of its rivals, seconds of
    its last attempt).
    """
    places: Counter[str] = Counter()
    rivals: Counter[str] = Counter()
    argv = options(folder, run_id)
    out = folder / f"{run_id}.txt"
    attempt = 0
    while True:
        fate, victim = None, rng.randrange(ranks)
        if sum(places.values()) < kills:
            place = rng.choice([p for p in PLACES if ranks > 1 or p != "all-reduce"])
            if place in ("write", "fsync", "link", "rename"):
                victim = 0  # who writes
            fate = place, rng.randint(1, 12), rng.uniform(0.0, seconds)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        start, children = time.perf_counter(), []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                child(
                    argv,
                    rank=rank,
                    ranks=ranks,
                    port=port,
                    attempt=attempt,
                    out=out,
                    fate=fate if rank == victim else None,
                )
            children.append(pid)
        second, said = None, folder / "rival.txt"
        if fate is not None:
            delay = rng.uniform(0.0, seconds)
            second = rival(argv, folder / "runs" / run_id, children[0], delay, said)
        codes, of_rival = wait(children, second)
        if second is not None:
            rivals[check_rival(of_rival, said)] += 1
        attempt += 1
        if any(codes) and (fate is None or codes[victim] != -signal.SIGKILL):
            raise SystemExit(
                f"{run_id}: exit codes {codes} without a kill:\n{out.read_text()[-3000:]}"
            )
        if fate is not None and codes[victim] == -signal.SIGKILL:
            places[fate[0]] += 1
        if not any(codes):
            return places, rivals, time.perf_counter() - start


def wait(children: list[int], second: int | None) -> tuple[list[int], int]:
    """Exit codes, and that of the rival `second`; after the first error the other processes are
    killed, as torchrun does.
    """
    codes: dict[int, int] = {}
    expected = {*children} if second is None else {*children, second}
    while codes.keys() != expected:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0 and pid != second:
            for other in children:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in children], codes.get(second, 0)


def result(path: Path) -> tuple[str, list]:
    """(sha256 of the final checkpoint, the results of every epoch in the log)."""
    saved = snapshot.read(path / "checkpoints" / "last.safetensors")
    digest = hashlib.sha256(json.dumps(saved.metadata["progress"], sort_keys=True).encode())
    for name, tensor in sorted(saved.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    lines = [json.loads(line) for line in (path / "log").read_text().splitlines()]
    kept = [
        {k: v for k, v in line.items() if k.startswith(("top", "ema", "train_loss", "epoch"))}
        for line in lines
    ]
    return digest.hexdigest(), kept


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--per-run", type=int, default=10, help="kills of one run")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    rng, total, wrong, start = random.Random(args.seed), Counter(), 0, time.perf_counter()
    rivals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as name:
        folder = Path(name)
        for split, source in (("train", Digits(0, TRAIN)), ("val", Digits(TRAIN, VAL))):
            write_beton(source, folder / f"{split}.beton", max_resolution=32, write_mode="raw")
        for ranks in args.ranks:
            _, _, seconds = run(folder, f"alone-{ranks}", ranks=ranks, kills=0, rng=rng, seconds=0)
            expected = result(folder / "runs" / f"alone-{ranks}")
            print(
                f"{ranks} processes: {EPOCHS} epochs in {seconds:.1f} s, sha256 {expected[0][:16]}",
                flush=True,
            )
            left, number = args.kills // len(args.ranks), 0
            while left > 0:
                number += 1
                run_id = f"killed-{ranks}-{number}"
                places, second, _ = run(
                    folder,
                    run_id,
                    ranks=ranks,
                    kills=min(left, args.per_run),
                    rng=rng,
                    seconds=seconds,
                )
                left, total = left - sum(places.values()), total + places
                rivals += second
                found = result(folder / "runs" / run_id)
                if found != expected:
                    wrong += 1
                    print(
                        f"{run_id}: WRONG after {dict(places)}: {found[0][:16]}, log {found[1]}",
                        flush=True,
                    )
                shutil.rmtree(folder / "runs" / run_id)
    kinds = ", ".join(f"{n} {place}" for place, n in sorted(total.items()))
    print(
        f"{sum(total.values())} kills ({kinds}) in {time.perf_counter() - start:.0f} s; runs that "
        f"differ: {wrong}; rivals: {rivals['refused']} refused, {rivals['late']} late"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
