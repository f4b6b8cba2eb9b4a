"""Fuzz the native code: damaged .beton files work or raise an error that names them; searches of
damaged rows are refused or right.

    python tests/fuzzing/fuzz.py --cases 20000 --seed 0       # case k is the same file in every run
    python tests/fuzzing/fuzz.py --case 4711                  # describes one case, keeps its file

Cases run in child processes: a crash or a hang ends one child, is reduced to the mutations that
cause it, and is kept in --out. Pixels that change although no mutation may change them are also
failures. Exit status 1 if there are failures.
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
from pathlib import Path
from random import Random

for _name in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
):  # children are forked: no threads here
    os.environ[_name] = "1"
if "--native" in sys.argv:  # another build of the native code, for example a sanitized one
    _built = Path(sys.argv[sys.argv.index("--native") + 1])
    for _wing, _folder in (("data", _built), ("retrieval", _built / "retrieval")):
        (_file,) = _folder.glob("_native*.so")
        _spec = importlib.util.spec_from_file_location(f"matryoshka.{_wing}._native", _file)
        assert _spec
        assert _spec.loader
        sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_spec.name])

sys.path.append(str(Path(__file__).resolve().parents[1] / "builders"))

import mutate
import mutate_jpeg  # noqa: F401 (registers its kinds)
from mutate_bases import bases
from probe import VIEWS, Failure, probe
from probe_search import probe_search

from matryoshka.data import _native
from matryoshka.retrieval import _native as _native_search

NAMES = sorted(mutate.KINDS)
BATCH = 500


# ---------------------------------------------------------------- one case


def mutations(case: int) -> tuple[int, list[tuple[str, Random]]]:
    """(base, [(kind, its own random numbers)]): leaving one out does not change the others."""
    rng = Random(case)
    count = rng.choice([1, 1, 1, 2, 2, 3, 5])
    return rng.randrange(len(bases())), [
        (rng.choice(NAMES), Random(case * 100 + k)) for k in range(count)
    ]


def damaged(
    case: int, left_out: frozenset[int] = frozenset()
) -> tuple[int, mutate.Draft, list[str]]:
    """(base, the file, names of the mutations that applied)."""
    base, todo = mutations(case)
    draft, done = bases()[base].copy(), []
    for k, (first, rng) in enumerate(todo):
        if k not in left_out:
            name = first
            while not mutate.apply(draft, name, rng):  # this file has nothing of the kind to change
                name = rng.choice(NAMES)
            done.append(name)
    return base, draft, done


# ---------------------------------------------------------------- a child


PROC = Path("/proc/self/clear_refs").exists()  # memory is measured on Linux only


def memory(key: str) -> int:
    with open("/proc/self/status" if PROC else os.devnull) as file:
        return 1024 * next((int(line.split()[1]) for line in file if line.startswith(key)), 0)


def run_case(
    case: int, pools, folder: Path, expected: list, left_out: frozenset[int] = frozenset()
) -> dict:
    base, draft, names = damaged(case, left_out)
    path = folder / "x.beton"
    draft.write(path)
    kinds = [mutate.KINDS[name] for name in names]
    result: dict = {"case": case, "kinds": names}
    start, before = time.perf_counter(), memory("VmRSS")
    if PROC:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this case alone
    try:
        result |= probe(pools[0], path, Random(case), expected[base])
        result["search"] = probe_search(pools[1], Random(case))
        allowed = {kind.pixels for kind in kinds}
        result["silent"] = bool(result.get("changed")) and allowed == {"same"}
        result["silent labels"] = bool(result.get("labels")) and not any(
            kind.labels for kind in kinds
        )
        if (result["silent"] or result["silent labels"]) and len(names) == 1:
            raise Failure("pixels or labels changed without an error")
        # leftover data may cause this, so only for a single mutation
        if result.get("stricter") and allowed == {"same"} and len(names) == 1:
            raise Failure("a crop is refused, the whole image is not")
        if (peak := memory("VmHWM")) > 2 * before:
            raise Failure(f"needs {(peak - before) / 1e6:.0f} MB, after {before / 1e6:.0f} MB")
    except Failure as failure:
        result["failure"] = str(failure)
    except BaseException:
        result["failure"] = traceback.format_exc()
    return result | {"ms": 1000 * (time.perf_counter() - start)}


def child(
    cases: list[int],
    pipe: int,
    current: mmap.mmap,
    errors: Path,
    *,
    limit: float,
    left_out=frozenset(),
) -> None:
    """Write one line of JSON per case to the pipe; `current` is the case being run."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    try:
        pool, expected = _native.Pool(2), []
        pools = pool, _native_search.Pool(2)
        for draft in bases():
            draft.write(folder / "sound.beton")
            expected.append(probe(pool, folder / "sound.beton", Random(0), None))
            assert not any(expected[-1][view[0]][0].any() for view in VIEWS), "a base is not sound"
        with os.fdopen(pipe, "w", buffering=1) as out:
            for case in cases:
                struct.pack_into("<q", current, 0, case)
                signal.setitimer(signal.ITIMER_REAL, limit)  # its signal ends the process
                out.write(json.dumps(run_case(case, pools, folder, expected, left_out)) + "\n")
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def run_child(cases: list[int], limit: float, left_out=frozenset()) -> list[dict]:
    """Results of the cases, in order; where the child died the last one is that failure, and the
    rest is missing.
    """
    current = mmap.mmap(-1, 8)
    struct.pack_into("<q", current, 0, -1)
    reader, writer = os.pipe()
    errors = Path(scratch()) / f"fuzz-{os.getpid()}.stderr"
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 70
        try:
            child(cases, writer, current, errors, limit=limit, left_out=left_out)
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
    return [r for r in results if r["case"] != case] + [
        {"case": case, "kinds": names, "failure": f"{how}\n{said}"}
    ]


# ---------------------------------------------------------------- the parent


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
    path.with_suffix(".txt").write_text(
        json.dumps(result["kinds"]) + "\n\n" + result.get("failure", "") + "\n"
    )
    return path


def report(results: list[dict], seconds: float) -> str:
    """What the single mutations did, then totals."""
    columns = ["cases", "refused", "samples refused", "same pixels", "changed"]
    table: dict[str, Counter] = defaultdict(Counter)
    for r in results:
        if len(r["kinds"]) == 1 and "outcome" in r:
            same = "changed" if r.get("changed") or r.get("labels") else "same pixels"
            table[r["kinds"][0]].update(
                ["cases", same if r["outcome"] == "decodes" else r["outcome"]]
            )
    lines = [f"{'single mutations':62}{'may change':>11}" + "".join(f"{c:>16}" for c in columns)]
    for name in sorted(table):
        kind = mutate.KINDS[name]
        may = {"same": "labels" if kind.labels else "nothing"}.get(kind.pixels, kind.pixels)
        lines.append(
            f"{name:62}{may:>11}" + "".join(f"{table[name][c] or '-':>16}" for c in columns)
        )
    total = Counter(r["outcome"] for r in results if "outcome" in r)
    combined = [r for r in results if r.get("silent") or r.get("silent labels")]
    slow = max(results, key=lambda r: r.get("ms", 0))
    lines += [
        "",
        f"{len(results):,} cases in {seconds:.0f} s: "
        + ", ".join(f"{n:,} {k}" for k, n in total.items()),
    ]
    searches = Counter(r["search"] for r in results if "search" in r)
    lines.append("searches: " + ", ".join(f"{n:,} {k}" for k, n in sorted(searches.items())))
    lines.append(f"silent changes, all mutations together: {len(combined)}")
    lines += [f"  case {r['case']}: {' + '.join(r['kinds'])}" for r in combined[:10]]
    if "ms" in slow:
        lines.append(
            f"slowest: case {slow['case']}, {slow['ms']:.0f} ms ({' + '.join(slow['kinds'])})"
        )
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cases", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0, help="number of the first case")
    p.add_argument("--case", type=int, help="run this case alone and keep its file")
    p.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    p.add_argument(
        "--limit", type=float, default=30, help="seconds after which a case counts as hanging"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("build/fuzz-failures"),
        help="folder for the files that fail",
    )
    p.add_argument("--native", help="build folder of other native modules than the installed ones")
    args = p.parse_args()
    if args.case is not None:
        result = run_child([args.case], args.limit)[0]
        print(json.dumps(result, indent=1), keep(result, frozenset(), args.out), sep="\n")
        return int("failure" in result)
    bases()  # once, before the children are forked
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
                print(
                    f"FAILURE: case {small['case']}: {' + '.join(small['kinds'])}: "
                    f"{small['failure'][-600:]}"
                )
                print(f"  kept: {keep(small, left_out, args.out)}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{len(results):,} cases, {failures} failures", end="", file=sys.stderr)
    print(report(results, time.perf_counter() - start))
    print(f"failures: {failures}" + f", the first are in {args.out}/" * bool(failures))
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
