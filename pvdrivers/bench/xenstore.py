"""The embedded xenstore beside C xenstored, driven by Xen's own test-xenstore.

Both servers run all the time, test-xenstore (package xen-utils) visits them in turn, and what counts is the
ratio of each pair of visits. C xenstored runs without a hypervisor by tests/peers/xenstored_preload.c.
With all three programs on one CPU a request costs what is computed for it; where the scheduler is free to use
two, the figure is mostly the wake-up.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import selectors
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sim.xenstore import XenStoreServer

PRELOAD_SOURCE = Path(__file__).resolve().parents[2] / "tests" / "peers" / "xenstored_preload.c"
_CASE = re.compile(r"^(.+?) *: avg: (\d+) ns ", re.MULTILINE)
_START_SECONDS = 20.0
_RESAMPLES = 2000


class PeerMissing(Exception):
    """Something that the comparison needs is not on this machine; the text says what."""


def find_program(name: str) -> str:
    """A program of xen-utils, wherever its version puts it. Raises PeerMissing."""
    candidates = [str(p) for p in sorted(Path("/usr/lib").glob(f"xen-*/bin/{name}"), reverse=True)]
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")
    candidates += [found] if found else []
    if not candidates:
        raise PeerMissing(f"{name} is not installed (Debian: xen-utils-4.17)")
    return candidates[0]


def build_preload(directory: Path) -> Path:
    """Compiles the preload library into `directory`. Raises PeerMissing."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise PeerMissing("no C compiler (Debian: gcc)")
    if not PRELOAD_SOURCE.is_file():
        raise PeerMissing(f"{PRELOAD_SOURCE.name} is not there; run from a source checkout")
    library = directory / "xenstored_preload.so"
    command = [compiler, "-O2", "-shared", "-fPIC", str(PRELOAD_SOURCE), "-o", str(library), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise PeerMissing(f"{PRELOAD_SOURCE.name} does not compile (Debian: libxen-dev):\n{built.stderr}")
    return library


@contextlib.contextmanager
def _running(command: list[str], socket_path: Path, environ: dict[str, str]) -> Iterator[Path]:
    """A server while it is needed; yields its socket."""
    log = socket_path.with_suffix(".log")
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + _START_SECONDS
        while not socket_path.exists():
            if process.poll() is not None or time.monotonic() > give_up:
                raise PeerMissing(f"{command[0]} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.01)
        yield socket_path
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def their_server(directory: Path) -> Iterator[Path]:
    """C xenstored without a hypervisor; yields its socket, beside which guests' rings are. Raises PeerMissing."""
    program = find_program("xenstored")
    home = directory / "theirs"
    home.mkdir()
    environ = {
        **os.environ,
        "LD_PRELOAD": str(build_preload(directory)),
        "PRELOAD_RINGS": str(home),
        "XENSTORED_RUNDIR": str(home),
        "XENSTORED_ROOTDIR": str(home),
    }
    environ.pop("XENSTORED_PATH", None)
    with _running([program, "-N", "--pid-file", str(home / "pid")], home / "socket", environ) as path:
        yield path


@contextlib.contextmanager
def our_server(directory: Path) -> Iterator[Path]:
    """The embedded store in a process of its own; yields its socket."""
    home = directory / "ours"
    home.mkdir()
    root = str(Path(__file__).resolve().parents[2])
    environ = {**os.environ, "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    path = home / "socket"
    program = f"from pvdrivers.bench.xenstore import serve; serve({str(path)!r})"
    with _running([sys.executable, "-c", program], path, environ) as ready:
        yield ready


def serve(path: str) -> None:
    """Serves a store at `path` until the process is ended."""
    with selectors.DefaultSelector() as selector:
        XenStoreServer(selector).listen(path)
        while True:
            for key, mask in selector.select():
                key.data(mask)


def visit(program: str, path: Path, iterations: int) -> dict[str, int]:
    """One run of test-xenstore: mean nanoseconds of each case. Raises RuntimeError if a case fails."""
    done = subprocess.run(
        [program, "-i", str(iterations)],
        env={**os.environ, "XENSTORED_PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    cases = {name: int(ns) for name, ns in _CASE.findall(done.stdout)}
    if done.returncode or not cases:
        raise RuntimeError(f"test-xenstore at {path} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return cases


def _interval(ratios: list[float]) -> tuple[float, float]:
    """95% interval of the median, by resampling."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]


def _measure(program: str, cpus: set[int], pairs: int, iterations: int) -> dict[str, list[tuple[int, int]]]:
    """Nanoseconds (ours, theirs) of every case and pair, with all programs on `cpus`."""
    times: dict[str, list[tuple[int, int]]] = {}
    home = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)  # inherited by what is started here
    try:
        with tempfile.TemporaryDirectory(prefix="xs-bench-") as name:
            directory = Path(name)
            with our_server(directory) as ours, their_server(directory) as theirs:
                for path in (ours, theirs):
                    visit(program, path, 50)
                for pair in range(pairs):
                    order = (ours, theirs) if pair % 2 else (theirs, ours)
                    result = {path: visit(program, path, iterations) for path in order}
                    for case, ns in result[ours].items():
                        times.setdefault(case, []).append((ns, result[theirs][case]))
    finally:
        os.sched_setaffinity(0, home)
    return times


def run(quick: bool) -> list[dict[str, Any]]:
    """One row for each case of test-xenstore and placement, or one row that says what is missing.

    A row: name; placement ("one CPU" for all three programs, or "free"); ours, theirs (median of the mean
    nanoseconds of an operation); ratio (their time by ours, so more is better for us), the median of the
    pairs, with ratio_low and ratio_high, its 95% interval; pairs, how many. A row without figures has
    `missing` instead.
    """
    pairs, iterations = (5, 200) if quick else (15, 1000)
    home = os.sched_getaffinity(0)
    rows: list[dict[str, Any]] = []
    try:
        program = find_program("test-xenstore")
        for placement, cpus in (("one CPU", {max(home)}), ("free", home)):
            for case, measured in _measure(program, cpus, pairs, iterations).items():
                ratios = [theirs / ours for ours, theirs in measured]
                low, high = _interval(ratios)
                rows.append(
                    {
                        "name": f"xenstore {case}",
                        "placement": placement,
                        "unit": "ns",
                        "ours": statistics.median(ours for ours, _ in measured),
                        "theirs": statistics.median(theirs for _, theirs in measured),
                        "ratio": statistics.median(ratios),
                        "ratio_low": low,
                        "ratio_high": high,
                        "pairs": len(measured),
                    }
                )
    except PeerMissing as e:
        return [{"name": "xenstore", "missing": str(e)}]
    return rows
