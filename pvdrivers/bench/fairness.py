"""`pvdrivers bench fairness`: what a greedy neighbour costs a guest that asks for one block at a time.

16 guests, a domain each with a disk of its own on one worker. One is greedy: 4 KiB random reads at depth 128 on a
four-page ring. One reads 4 KiB at depth 1, and its latency is what is measured. The other 14 are lightly loaded: each
reads one block ten times a second. In turns the depth-1 guest runs with all of them, and alone while they are
connected and idle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import report
from .agent import Agent
from .bed import Bed
from .files import FILE_SIZE, Files, default_directory
from .machine import Missing, load_note, two_cpus

__all__ = ["run"]

GUESTS = 16
TARGET = 3.0
PAIRS, PAIRS_QUICK = 9, 3
SECONDS, SECONDS_QUICK = 2.0, 1.0
GREEDY = {"depth": 128}
PER_SECOND = 10
_SMALL = 64 << 20
_SETTLE = 0.2  # seconds that the greedy guest has run before the other is measured
_STORES = {"null": "null: stores", "memory": "memory: stores", "disk": "one real file, O_DIRECT"}

Run = dict[str, Any]


def run(
    quick: bool = False,
    *,
    directory: Path | None = None,
    pairs: int | None = None,
    seconds: float | None = None,
    only: Sequence[str] | None = None,
    size: int = FILE_SIZE,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """The rows for each kind of store (null, memory, disk; `only`: some of them), in the form of report.py."""
    pairs = pairs or (PAIRS_QUICK if quick else PAIRS)
    seconds = seconds or (SECONDS_QUICK if quick else SECONDS)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        files = Files(stack, directory or default_directory(), size)
        for store, name in _STORES.items():
            if only is not None and store not in only:
                continue
            work = f"depth-1 guest among {GUESTS}, one greedy at depth 128; {name}"
            try:
                found = _measure(work, _uri(store, files), pairs, seconds)
            except Missing as e:
                found = [{"work": work, "beside": "the same guest alone", "missing": str(e)}]
            rows += found
            for row in found:
                say(report.text([row]).splitlines()[-1])
    return rows


def _uri(store: str, files: Files) -> str:
    if store == "disk":
        return f"{files.path('disk')},direct=yes,mode=r"
    return f"{store}:{_SMALL}"


def _measure(work: str, uri: str, pairs: int, seconds: float) -> list[dict[str, Any]]:
    cpus = two_cpus()
    alone: list[Run] = []
    among: list[Run] = []
    greedy_rates: list[float] = []
    with Bed(cpus={cpus[0]}) as bed:
        # One process for each guest that works hard; the 14 others do little, and share one.
        modest = bed.guest(bed.disks([uri]), {cpus[1]})
        greedy = bed.guest(bed.disks([uri], ring_order=2), {cpus[1]})
        light = bed.guest([bed.disks([uri])[0] for _ in range(GUESTS - 2)], {cpus[1]})
        for guest, plan in ((modest, {"depth": 1}), (greedy, GREEDY)):
            guest.ask({"run": {**plan, "requests": 2000, "seconds": 60.0}, "disk": 0}, 60.0)

        def with_others() -> None:
            light.ask({"poke": list(range(GUESTS - 2)), "per_second": PER_SECOND})
            greedy.ask({"start": GREEDY, "disk": 0})
            _depth_1(modest, _SETTLE)
            among.append(_depth_1(modest, seconds))
            greedy_rates.append(greedy.ask({"finish": True})["rate"])
            light.ask({"rest": True})

        def by_itself() -> None:
            alone.append(_depth_1(modest, seconds))

        for i in range(pairs):
            for turn in (with_others, by_itself) if i % 2 else (by_itself, with_others):
                turn()
    where = "serve on a core, all guests on the other"
    return [
        report.row_of_pairs(
            f"{work}: {name} latency", "the same guest alone", among, alone, key=key, unit="us", target=TARGET,
            sense="<=", ours_where=where, theirs_where=where, greedy_rates=greedy_rates, note=load_note(),
        )
        for name, key in (("median", "p50_us"), ("mean", "mean_us"))
    ]  # fmt: skip


def _depth_1(guest: Agent, seconds: float) -> Run:
    return guest.ask({"run": {"depth": 1, "seconds": seconds}, "disk": 0}, seconds)
