"""`pvdrivers bench ring`: our ring between two processes, beside the same in C with Xen's own macros.

Both do the same work, message by message (ring_kernels.py, peers/ring_peer.c), in the same two places, in turns
within one run; see compare.py for what is made of the pairs.
"""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pvdrivers.bench import compare
from pvdrivers.bench import ring_kernels as kernels
from rings.blkif import ENTRY_SIZE_64
from rings.ring import PAGE_SIZE, RING_END, back_end, format_page, front_end, ring_entries

__all__ = ["COLUMNS", "run", "text"]

TARGET = 1.0
PAIRS, PAIRS_QUICK = 21, 5
SECONDS, SECONDS_QUICK = 0.06, 0.02  # of each single run, about
WARM_UP = 2000
_PEER = Path(__file__).with_name("peers") / "ring_peer.c"
_HEADER = Path("/usr/include/xen/io/ring.h")

COLUMNS = {
    "work": "ring",
    "ours": "ours /s",
    "theirs": "C /s",
    "ratio": "ratio [95 %]",
    "pairs": "pairs",
    "target": "at least",
    "met": "met",
    "ours_p50_ns": "p50 ns",
    "theirs_p50_ns": "C p50",
    "ours_p99_ns": "p99 ns",
    "theirs_p99_ns": "C p99",
    "ours_cpu_ns": "CPU ns/msg",
    "theirs_cpu_ns": "C CPU",
    "where": "where",
    "note": "note",
}


@dataclass(frozen=True)
class Row:
    """One kind of work. Depth 0 is the whole ring."""

    pages: int
    depth: int
    mode: int
    target: float | None

    @property
    def name(self) -> str:
        wait = "busy" if self.mode == kernels.POLL else "eventfd"
        pages = "1 page" if self.pages == 1 else f"{self.pages} pages"
        return f"{pages}, {'full' if self.depth == 0 else f'depth {self.depth}'}, {wait}"


ROWS = [
    *(Row(pages, depth, kernels.POLL, TARGET) for depth in (0, 1) for pages in (1, 4, 16)),
    Row(1, 0, kernels.SLEEP, None),
]


@dataclass(frozen=True)
class Result:
    """One run: messages a second, percentiles in ns, CPU in ns a message."""

    rate: float
    p50: float
    p99: float
    notified: int
    cpu: float


def run(quick: bool = False, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Measure every row; one dict each, with the keys of COLUMNS and low, median and high of the ratio.

    `say` gets a line as each row is done. Without gcc or Xen's headers the rows have our figures only, and say so.
    """
    cpus = _two_cpus()
    mhz = _tick_mhz()
    _compile()
    rows = []
    with tempfile.TemporaryDirectory(prefix="pvdrivers-bench-") as directory:
        peer, lack = _build(Path(directory))
        for row in ROWS:
            rows.append(_measure(row, cpus, mhz, peer, lack, quick))
            say(text(rows[-1:]).splitlines()[-1])
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    return compare.table(rows, COLUMNS)


def _measure(row: Row, cpus: tuple[int, int], mhz: float, peer: Path | None, lack: str, quick: bool) -> dict[str, Any]:
    seconds, pairs = (SECONDS_QUICK, PAIRS_QUICK) if quick else (SECONDS, PAIRS)
    total = max(500, int(_ours(row, 5000, cpus, mhz).rate * seconds))
    ours: list[Result] = []
    theirs: list[Result] = []
    for i in range(pairs):
        # Who comes second finds warm caches, or a tired neighbour: each comes second half of the time.
        for turn in ("theirs", "ours") if i & 1 else ("ours", "theirs"):
            if turn == "ours":
                ours.append(_ours(row, total, cpus, mhz))
            elif peer is not None:
                theirs.append(_theirs(peer, row, total, cpus, mhz))
    out: dict[str, Any] = {
        "work": row.name,
        "pages": row.pages,
        "depth": row.depth,
        "mode": "poll" if row.mode == kernels.POLL else "eventfd",
        "total": total,
        "where": f"front cpu {cpus[0]}, back cpu {cpus[1]}",
        "target": row.target,
        "note": lack or _busy(),
        **_summary("ours", ours),
        **_summary("theirs", theirs),
    }
    if theirs:
        ratio = compare.paired([r.rate for r in ours], [r.rate for r in theirs])
        out |= {"median": ratio.median, "low": ratio.low, "high": ratio.high, "pairs": ratio.n}
        out["ratio"] = str(ratio)
        if row.target is not None:
            out["met"] = ratio.meets(row.target)
    return out


def _summary(who: str, runs: list[Result]) -> dict[str, Any]:
    if not runs:
        return {}
    middle = statistics.median
    return {
        who: middle(r.rate for r in runs),
        f"{who}_p50_ns": int(middle(r.p50 for r in runs)),
        f"{who}_p99_ns": int(middle(r.p99 for r in runs)),
        f"{who}_cpu_ns": middle(r.cpu for r in runs),
        f"{who}_notified": int(middle(r.notified for r in runs)),
    }


def _busy() -> str | None:
    """What to think of figures that were taken while others wanted the same cores."""
    load = os.getloadavg()[0]
    return f"load {load:.1f}: not quiet" if load > 2.5 else None


def _two_cpus() -> tuple[int, int]:
    """Where front and back run: two cores, or the only one."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[0], cpus[1 % len(cpus)]


def _tick_mhz() -> float:
    """Ticks of the cycle counter a microsecond."""
    began, ticks = time.perf_counter_ns(), kernels.now()
    time.sleep(0.05)
    ended, ticks_end = time.perf_counter_ns(), kernels.now()
    return float((ticks_end - ticks) * 1000 / (ended - began))


def _compile() -> None:
    """Have both loops compiled before anything forks: a child would compile within what is measured."""
    private = _Private()
    format_page(private.sring)
    private.attach(1)
    kernels.front(private.front, 1, 0, kernels.POLL, -1, -1, 1.0, private.stamps, private.latency, private.inbox)
    kernels.back(private.back, 0, kernels.POLL, -1, -1, private.inbox)


class _Private:
    """Memory for one run. The ring is shared by two processes; of the rest each touches its own pages only."""

    def __init__(self) -> None:
        size = 1 << 21
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self.array = np.frombuffer(self.map, np.uint8)
        base = int(self.array.ctypes.data)
        self.sring = base
        self.front, self.back = base + (1 << 17), base + (1 << 17) + 2 * PAGE_SIZE
        self.flags = self.array[(1 << 17) + 4 * PAGE_SIZE :][:24].view(np.int64)  # ready, CPU of the child, notified
        self.inbox = base + (1 << 17) + 8 * PAGE_SIZE  # two, one behind the other
        self.stamps = base + (1 << 17) + 16 * PAGE_SIZE
        self.latency = base + (1 << 20)
        self.histogram = self.array[1 << 20 :][: 8 * kernels.BUCKETS].view(np.int64)

    def attach(self, pages: int) -> int:
        """Both ends; the number of slots."""
        entries = ring_entries(pages * PAGE_SIZE, ENTRY_SIZE_64)
        if front_end(self.front, self.sring, entries, ENTRY_SIZE_64) != 0:
            raise AssertionError("front")
        if back_end(self.back, self.sring, entries, ENTRY_SIZE_64) != 0:
            raise AssertionError("back")
        return entries

    def notified(self, end: int) -> int:
        """How often this end woke the other."""
        at = end - self.sring
        return int(self.array[at : at + RING_END.itemsize].view(RING_END)["notify_sent"][0])


def _ours(row: Row, total: int, cpus: tuple[int, int], mhz: float) -> Result:
    """One run of ours: this process is the front end, a child the back end."""
    private = _Private()
    format_page(private.sring)
    depth = row.depth or private.attach(row.pages)
    private.attach(row.pages)
    to_front, to_back = os.eventfd(0), os.eventfd(0)
    home = os.sched_getaffinity(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.sched_setaffinity(0, {cpus[1]})
            before = _cpu_ns()
            private.flags[0] = 1
            inbox = private.inbox + 4 * PAGE_SIZE
            status = kernels.back(private.back, WARM_UP + total, row.mode, to_back, to_front, inbox)
            private.flags[1] = _cpu_ns() - before
        finally:
            os._exit(0 if status == 0 else 1)
    try:
        os.sched_setaffinity(0, {cpus[0]})
        while not private.flags[0]:
            time.sleep(0)

        def front(n: int) -> int:
            return int(
                kernels.front(
                    private.front,
                    depth,
                    n,
                    row.mode,
                    to_front,
                    to_back,
                    1000 / mhz,
                    private.stamps,
                    private.latency,
                    private.inbox,
                )
            )

        # The first messages also wait for the child to get from fork to its loop.
        ticks = front(WARM_UP)
        private.histogram[:] = 0
        before = _cpu_ns()
        if ticks >= 0:
            ticks = front(total)
        spent = _cpu_ns() - before
    finally:
        os.sched_setaffinity(0, home)
        _, status = os.waitpid(child, 0)
        os.close(to_front)
        os.close(to_back)
    if ticks < 0 or status != 0:
        raise RuntimeError(f"bench ring: {row.name}: the loop found a message that was not as it was sent")
    counts = np.cumsum(private.histogram)
    p50, p99 = (int(np.searchsorted(counts, total * part)) * kernels.BUCKET_NS for part in (0.5, 0.99))
    notified = private.notified(private.front) + private.notified(private.back)
    return Result(total / (ticks / mhz / 1e6), p50, p99, notified, (spent + int(private.flags[1])) / total)


def _cpu_ns() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return int((usage.ru_utime + usage.ru_stime) * 1e9)


def _build(directory: Path) -> tuple[Path | None, str]:
    """Compile the peer; or None, and what is lacking."""
    gcc = shutil.which("gcc")
    if gcc is None:
        return None, "no C peer: gcc is not installed"
    if not _HEADER.exists():
        return None, "no C peer: libxen-dev is not installed"
    program = directory / "ring_peer"
    made = subprocess.run(
        [gcc, "-O3", "-march=native", "-o", program, _PEER], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        return None, f"no C peer: gcc: {made.stderr.strip().splitlines()[0] if made.stderr else made.returncode}"
    return program, ""


def _theirs(program: Path, row: Row, total: int, cpus: tuple[int, int], mhz: float) -> Result:
    """One run of the C peer."""
    arguments = [row.pages, row.depth, total, row.mode, *cpus, mhz]
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True)
    rate, p50, p99, notified, cpu = map(float, done.stdout.split())
    return Result(rate, p50, p99, int(notified), cpu / total)
