"""Opens and decodes thousands of damaged .beton files; each must work, or be refused by an error that names it.

    python tests/fuzz.py --cases 20000 --seed 0       # case k is the same file in every run
    python tests/fuzz.py --case 4711                  # one case, in words; its file is kept

Cases run in child processes: a crash or a hang ends one child, is reduced to the mutations that it needs and
kept in --out. Pixels that change although nothing legally changed them are failures, too.
Exit status 1 when there are failures.
"""

# ruff: noqa: E402 (the environment and the native core are chosen before NumPy and matryoshka are imported)
import argparse
import importlib.util
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from random import Random

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # children are forked: no threads here
    os.environ[_name] = "1"
if "--native" in sys.argv:  # another build of the native core, for example a sanitized one
    _spec = importlib.util.spec_from_file_location("matryoshka.data._native", sys.argv[sys.argv.index("--native") + 1])
    assert _spec
    assert _spec.loader
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

import mutate
import mutate_jpeg  # noqa: F401 (registers its kinds)
import numpy as np
from matryoshka.train import check_data

from matryoshka.data import BetonError, BetonFile, CenterCrop, Loader, RandomResizedCrop, _native
from matryoshka.data.sources import decode_image

NAMES = sorted(mutate.KINDS)
BATCH = 500
RANDOM, SMALL = ((0.08, 1.0), (0.75, 4 / 3), 0.5), ((0.01, 0.05), (0.5, 2.0), 0.5)
# name, crops of (width, height, index), output side, exact pixels or those for training
VIEWS = [("whole", lambda w, h, _: whole(w, h), 16, True)]
VIEWS += [("centre", lambda w, h, _: _native.center_crops(w, h, 0.875), 96, True)]
for _k in range(3):
    _random = lambda w, h, i, k=_k: _native.random_crops(w, h, i, 7, k, *RANDOM)  # noqa: E731
    _tiny = lambda w, h, i, k=_k: _native.random_crops(w, h, i, 7, k, *SMALL)  # noqa: E731
    VIEWS += [(f"random {_k}", _random, 128, True), (f"tiny {_k}", _tiny, 24, True)]
    VIEWS += [(f"training {_k}", _random, 64, False), (f"training tiny {_k}", _tiny, 24, False)]
VIEWS += [("training small", lambda w, h, _: whole(w, h), 12, False)]  # may decode at half size


def whole(width, height):
    return np.stack([0 * width, 0 * width, width, height, 0 * width], 1).astype(np.int32)


class Failure(Exception):
    """What must not happen, in words."""


# ------------------------------------------------------------------------------------------------- one case


def mutations(case: int) -> tuple[int, list[tuple[str, Random]]]:
    """(base, [(kind, its own random numbers)]): leaving one out does not change the others."""
    rng = Random(case)
    count = rng.choice([1, 1, 1, 2, 2, 3, 5])
    return rng.randrange(len(mutate.bases())), [(rng.choice(NAMES), Random(case * 100 + k)) for k in range(count)]


def damaged(case: int, left_out: frozenset[int] = frozenset()) -> tuple[int, mutate.Draft, list[str]]:
    """(base, the file, names of the mutations that applied)."""
    base, todo = mutations(case)
    draft, done = mutate.bases()[base].copy(), []
    for k, (first, rng) in enumerate(todo):
        if k not in left_out:
            name = first
            while not mutate.apply(draft, name, rng):  # this kind has nothing to change in this file
                name = rng.choice(NAMES)
            done.append(name)
    return base, draft, done


def decode(pool, data: BetonFile, view) -> tuple[np.ndarray, np.ndarray]:
    """(status, pixels) of every sample."""
    indices = np.arange(len(data))
    samples = data.fetch(indices)
    crops = view[1](samples.width, samples.height, indices)
    out = np.full((len(data), view[2], view[2], 3), 7, np.uint8)
    status = _native.decode_batch(
        pool, samples.data, samples.offset, samples.size, samples.mode, samples.width, samples.height, crops,
        out, view[3],
    )  # fmt: skip
    if out[status != 0].any():
        raise Failure(f"{view[0]}: a refused sample has left pixels")
    return status, out


def compare_with_whole_decode(pool, data: BetonFile, view, status: np.ndarray, out: np.ndarray) -> None:
    """A crop must be that of the whole image, whichever bytes the decoder looked at."""
    for i in np.flatnonzero((status == 0) & (data.mode == 0)).tolist():
        start, size = int(data.offset[i]), int(data.size[i])
        try:
            pixels = _native.decode(data.fetch(np.array([i])).data[start : start + size])
        except ValueError:
            continue  # the damage lies outside the crop
        shape = [np.array([n], np.int32) for n in pixels.shape[1::-1]]
        raw, index = pixels.reshape(-1), np.array([i])
        again = np.empty((1, view[2], view[2], 3), np.uint8)
        zero, one = np.zeros(1, np.uint64), np.ones(1, np.uint8)
        crops = view[1](*shape, index)
        _native.decode_batch(pool, raw, zero, np.array([raw.size], np.uint64), one, *shape, crops, again)
        if (again[0] != out[i]).any():
            raise Failure(f"{view[0]}: sample {i}: the crop differs from that of the whole image")


def probe(pool, path: Path, rng: Random, expected: dict | None) -> dict:
    """Uses a file in every way. expected: {view: pixels} and labels of the sound file, None to return these."""
    try:
        data = BetonFile(path)
    except BetonError as error:
        check_message(error, path)
        return {"outcome": "refused", "reason": str(error)}
    labels = data.labels.tolist() if any(kind == 1 for _, kind in data.fields) else None
    results = {view[0]: decode(pool, data, view) for view in (VIEWS if expected is None else picked(rng))}
    if expected is None:
        return results | {"labels": labels}
    refused, stricter = np.zeros(len(data), np.uint8), False
    changed = len(data) != len(next(iter(expected.values()))[0])
    for name, (status, out) in results.items():
        stricter = stricter or bool(((status != 0) & (results["whole"][0] == 0)).any())
        refused = np.maximum(refused, status)
        if not changed:
            changed = bool((out[status == 0] != expected[name][1][status == 0]).any())
    if rng.random() < 0.3:
        view = rng.choice([view for view in VIEWS if view[0] in results and view[3]])
        compare_with_whole_decode(pool, data, view, *results[view[0]])
    if rng.random() < 0.2:
        compare_after_others(data)
    if rng.random() < 0.1:
        as_file_of_its_own(data, rng.randrange(len(data)))
    for name, _ in data.fields:
        try:
            data.field(name, np.arange(len(data)))
        except BetonError as error:
            check_message(error, path)
    if rng.random() < 0.05:
        check_data.describe(data)
        check_data.info_text(check_data.describe(data))
    if rng.random() < 0.03:
        through_loader(path, data, rng)
    return {
        "outcome": "samples refused" if refused.any() else "decodes",
        "reason": _native.status_message(int(refused.max())),
        "changed": changed,
        "stricter": stricter,
        "labels": labels != expected["labels"],
    }


def picked(rng: Random) -> list:
    return [VIEWS[0], *rng.sample(VIEWS[1:], 4)]


def as_file_of_its_own(data: BetonFile, index: int) -> None:
    """What the writer does with the bytes of an image."""
    samples = data.fetch(np.array([index]))
    content = samples.data[int(samples.offset[0]) : int(samples.offset[0] + samples.size[0])].tobytes()
    for use in (_native.jpeg_size, _native.decode, _native.transcode, decode_image):
        try:
            result = use(content)
        except ValueError:
            continue
        if use is _native.transcode and (_native.decode(result) != _native.decode(content)).any():
            raise Failure("transcode changes pixels")


def through_loader(path: Path, data: BetonFile, rng: Random) -> None:
    image = rng.choice([RandomResizedCrop(20), CenterCrop(24)])
    try:
        for batch in Loader(path, rng.randint(1, 4), order="random", image=image, num_workers=2, seed=rng.randrange(9)):
            if batch.images.shape[1:] != (image.size, image.size, 3):
                raise Failure(f"the loader made {batch.images.shape}")
    except BetonError as error:
        check_message(error, path)
        if "sample" not in str(error) and "no integer field" not in str(error):
            raise Failure(f"an error that names no sample: {error}") from None


def compare_after_others(data: BetonFile) -> None:
    """The pixels of an image must not depend on the image that its thread has decoded before."""
    pool, results = _native.Pool(1), []
    for quality in (5, 95):
        _native.decode_batch(pool, *neighbour(quality))
        results.append(decode(pool, data, VIEWS[0]))
    (status, out), (status_2, out_2) = results
    if (status != status_2).any() or (out != out_2).any():
        raise Failure("the result depends on the image decoded before")


@cache
def neighbour(quality: int) -> tuple:
    jpeg = _native.encode(np.asarray(mutate.picture(16, 16, 0)), quality)
    size, crops = np.array([16], np.int32), np.array([[0, 0, 16, 16, 0]], np.int32)
    spans = np.zeros(1, np.uint64), np.array([len(jpeg)], np.uint64), np.zeros(1, np.uint8)
    return jpeg, *spans, size, size, crops, np.empty((1, 8, 8, 3), np.uint8)


def check_message(error: BetonError, path: Path) -> None:
    if str(path) not in str(error) or not str(error).isprintable():
        raise Failure(f"not a message of one line that names the file: {error!r}")


# --------------------------------------------------------------------------------------------------- a child


PROC = Path("/proc/self/clear_refs").exists()  # elsewhere than on Linux nobody looks at the memory


def memory(key: str) -> int:
    with open("/proc/self/status" if PROC else os.devnull) as file:
        return 1024 * next((int(line.split()[1]) for line in file if line.startswith(key)), 0)


def run_case(case: int, pool, folder: Path, expected: list, left_out: frozenset[int] = frozenset()) -> dict:
    base, draft, names = damaged(case, left_out)
    path = folder / "x.beton"
    draft.write(path)
    kinds = [mutate.KINDS[name] for name in names]
    result: dict = {"case": case, "kinds": names}
    start, before = time.perf_counter(), memory("VmRSS")
    if PROC:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this case alone
    try:
        result |= probe(pool, path, Random(case), expected[base])
        allowed = {kind.pixels for kind in kinds}
        result["silent"] = bool(result.get("changed")) and allowed == {"same"}
        result["silent labels"] = bool(result.get("labels")) and not any(kind.labels for kind in kinds)
        if (result["silent"] or result["silent labels"]) and len(names) == 1:
            raise Failure("pixels or labels changed and nobody noticed")
        if result.get("stricter") and allowed == {"same"} and len(names) == 1:  # data left over may do so
            raise Failure("a crop is refused, the whole image is not")
        if (peak := memory("VmHWM")) > 2 * before:
            raise Failure(f"needs {(peak - before) / 1e6:.0f} MB, after {before / 1e6:.0f} MB")
    except Failure as failure:
        result["failure"] = str(failure)
    except BaseException:
        result["failure"] = traceback.format_exc()
    return result | {"ms": 1000 * (time.perf_counter() - start)}


def child(cases: list[int], pipe: int, current: mmap.mmap, errors: Path, limit: float, left_out=frozenset()) -> None:
    """One line of JSON for every case into the pipe; `current` holds the case at work."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    try:
        pool, expected = _native.Pool(2), []
        for draft in mutate.bases():
            draft.write(folder / "sound.beton")
            expected.append(probe(pool, folder / "sound.beton", Random(0), None))
            assert not any(expected[-1][view[0]][0].any() for view in VIEWS), "a base is not sound"
        with os.fdopen(pipe, "w", buffering=1) as out:
            for case in cases:
                struct.pack_into("<q", current, 0, case)
                signal.setitimer(signal.ITIMER_REAL, limit)  # its signal ends the process
                out.write(json.dumps(run_case(case, pool, folder, expected, left_out)) + "\n")
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def run_child(cases: list[int], limit: float, left_out=frozenset()) -> list[dict]:
    """Results of the cases, in order; where the child died the last one is that failure, and the rest is missing."""
    current = mmap.mmap(-1, 8)
    struct.pack_into("<q", current, 0, -1)
    reader, writer = os.pipe()
    errors = Path(scratch()) / f"fuzz-{os.getpid()}.stderr"
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 70
        try:
            child(cases, writer, current, errors, limit, left_out)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as lines:
        results = [json.loads(line) for line in lines if line.endswith("\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = errors.read_text(errors="replace")[:20000] if errors.exists() else ""
    errors.unlink(missing_ok=True)
    if status == 0:
        return results
    case = struct.unpack_from("<q", current)[0]
    if case == -1:
        raise SystemExit(f"the child could not start:\n{said}")
    how = "HANG" if status == -signal.SIGALRM else f"CRASH (status {status})"
    names = damaged(case, left_out)[2]
    return [r for r in results if r["case"] != case] + [{"case": case, "kinds": names, "failure": f"{how}\n{said}"}]


# -------------------------------------------------------------------------------------------------- the parent


def minimised(result: dict, limit: float) -> tuple[dict, frozenset[int]]:
    """The failure with as few of its mutations as still make it fail."""
    left_out: frozenset[int] = frozenset()
    count = len(mutations(result["case"])[1])
    for k in range(count) if count > 1 else ():
        if len(left_out) + 1 < count:
            fewer = run_child([result["case"]], limit, left_out | {k})[0]
            if fewer.get("failure", "")[:4] == result["failure"][:4]:
                left_out, result = left_out | {k}, fewer
    return result, left_out


def keep(result: dict, left_out: frozenset[int], out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"case-{result['case']}.beton"
    damaged(result["case"], left_out)[1].write(path)
    path.with_suffix(".txt").write_text(json.dumps(result["kinds"]) + "\n\n" + result.get("failure", "") + "\n")
    return path


def report(results: list[dict], seconds: float) -> str:
    """What the single mutations did, then totals."""
    columns = ["cases", "refused", "samples refused", "same pixels", "changed"]
    table: dict[str, Counter] = defaultdict(Counter)
    for r in results:
        if len(r["kinds"]) == 1 and "outcome" in r:
            same = "changed" if r.get("changed") or r.get("labels") else "same pixels"
            table[r["kinds"][0]].update(["cases", same if r["outcome"] == "decodes" else r["outcome"]])
    lines = [f"{'single mutations':62}{'may change':>11}" + "".join(f"{c:>16}" for c in columns)]
    for name in sorted(table):
        kind = mutate.KINDS[name]
        may = {"same": "labels" if kind.labels else "nothing"}.get(kind.pixels, kind.pixels)
        lines.append(f"{name:62}{may:>11}" + "".join(f"{table[name][c] or '-':>16}" for c in columns))
    total = Counter(r["outcome"] for r in results if "outcome" in r)
    combined = [r for r in results if r.get("silent") or r.get("silent labels")]
    slow = max(results, key=lambda r: r.get("ms", 0))
    lines += ["", f"{len(results):,} cases in {seconds:.0f} s: " + ", ".join(f"{n:,} {k}" for k, n in total.items())]
    lines.append(f"silent changes, all mutations together: {len(combined)}")
    lines += [f"  case {r['case']}: {' + '.join(r['kinds'])}" for r in combined[:10]]
    if "ms" in slow:
        lines.append(f"slowest: case {slow['case']}, {slow['ms']:.0f} ms ({' + '.join(slow['kinds'])})")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0, help="number of the first case")
    p.add_argument("--case", type=int, help="run this case alone and keep its file")
    p.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    p.add_argument("--limit", type=float, default=30, help="seconds after which a case counts as hanging")
    p.add_argument("--out", type=Path, default=Path("build/fuzz-failures"), help="folder for the files that fail")
    p.add_argument("--native", help="path of another build of the module matryoshka.data._native")
    args = p.parse_args()
    if args.case is not None:
        result = run_child([args.case], args.limit)[0]
        print(json.dumps(result, indent=1), keep(result, frozenset(), args.out), sep="\n")
        return int("failure" in result)
    mutate.bases()  # once, before the children are forked
    start, results, failures = time.perf_counter(), [], 0
    todo = list(range(args.seed, args.seed + args.cases))
    while todo and time.perf_counter() - start < args.seconds:
        found = run_child(todo[:BATCH], args.limit)
        todo = todo[len(found) :]
        results += found
        for result in [r for r in found if "failure" in r]:
            failures += 1
            if failures <= 20:
                small, left_out = minimised(result, args.limit)
                print(f"FAILURE: case {small['case']}: {' + '.join(small['kinds'])}: {small['failure'][-600:]}")
                print(f"  kept: {keep(small, left_out, args.out)}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{len(results):,} cases, {failures} failures", end="", file=sys.stderr)
    print(report(results, time.perf_counter() - start))
    print(f"failures: {failures}" + f", the first are in {args.out}/" * bool(failures))
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
