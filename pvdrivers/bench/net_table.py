"""Tables of `pvdrivers bench net`: from guest to guest, to nobody and to a TAP, each size with each number of queues.

All cells of a table are loads of one process on one daemon, in turns, as the sides of a comparison are: so they may be
compared with each other, and what has several queues stands beside the same with one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import report
from .agent import Agent
from .bed import Bed
from .machine import Missing, load_note, two_cpus
from .net_rows import GSO, SMALL_SET, Traffic
from .net_sides import BRIDGES, SPIN_US, WARM_SECONDS, plan_of, turn, up
from .turns import Measure, Run, in_turns

__all__ = ["TABLES", "Table", "measure"]

QUEUES = (1, 2, 4)
SIZES = (64, 1500, GSO)
PART = 4
"""A cell has so small a part of the time that others take: there are many."""
_LATENCIES = {"p50_us": "median", "p99_us": "99 %"}


@dataclass(frozen=True)
class Table:
    """Cells of one `how`, see Traffic. With `one_at_a_time` it is asked how long a packet takes."""

    key: str
    what: str
    how: str
    queues: tuple[int, ...] = QUEUES
    one_at_a_time: bool = False

    @property
    def cells(self) -> list[Traffic]:
        """In the order of the rows."""
        look = "headers" if self.one_at_a_time else "sample"
        return [
            Traffic(self.how, size, queues, look=look, one_at_a_time=self.one_at_a_time)
            for size in SIZES
            for queues in self.queues
        ]


TABLES = (
    Table("guest", "guest to guest", "one"),
    Table("null", "guest to null", "null"),
    Table("tap", "guest to tap", "tap"),
    Table("latency", "guest to guest, one packet at a time, from A's stamp to B's look", "one", (1,), True),
)


def measure(table: Table, pairs: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of a table, in the form of report.py."""
    cells = {_name(table, cell): cell for cell in table.cells}
    try:
        with _stand(table) as measures:
            runs = in_turns(measures, pairs, seconds / PART)
    except Missing as e:
        return [{"work": name, "beside": None, "key_of_row": table.key, "missing": str(e)} for name in cells]
    rows = []
    for name, cell in cells.items():
        common = {"key_of_row": table.key, "ours_where": cell.where, "working_set": cell.working_set}
        if table.one_at_a_time:
            rows += [_latency(f"{name}: {text}", runs[name], key, common) for key, text in _LATENCIES.items()]
        else:
            one = None if cell.queues == 1 else runs[_name(table, Traffic(cell.how, cell.size))]
            rows.append(_rate(name, runs[name], one, common))
    return rows


def _name(table: Table, cell: Traffic) -> str:
    size = f"{cell.size} bytes{' (GSO)' if cell.gso_size else ''}"
    return f"{table.what}, {size}, {cell.queues} queue{'s' * (cell.queues > 1)}"


def _rate(name: str, runs: list[Run], one: list[Run] | None, common: dict[str, Any]) -> dict[str, Any]:
    """Packets a second, beside one queue; how many bytes that is stands in the note."""
    nbytes = report.number(report.median_of(runs, "bytes_per_second"), "B/s")
    common = {**common, "note": "; ".join(filter(None, (nbytes, load_note())))}
    if one is not None:
        return report.row_of_pairs(name, "1 queue", runs, one, theirs_where=common["ours_where"], **common)
    row = report.row_of_values(name, [run["rate"] for run in runs], unit="/s", **common)
    return {**row, "ours_cpu_us": report.median_of(runs, "cpu_us"), "runs": runs}


def _latency(name: str, runs: list[Run], key: str, common: dict[str, Any]) -> dict[str, Any]:
    return {**report.row_of_values(name, [run[key] for run in runs], unit="us", note=load_note(), **common),
            "runs": runs}  # fmt: skip


@contextlib.contextmanager
def _stand(table: Table) -> Iterator[dict[str, Measure]]:
    """Everything is ready: what measures each cell, by its name."""
    back, front = two_cpus()
    with Bed(cpus={back}, spin_us=SPIN_US, classes=["vif"]) as bed:
        vifs: list[dict[str, Any]] = []
        paths: dict[int, list[int]] = {}
        for queues in table.queues:
            bridge = BRIDGES.get(table.how, "switch:bench") + (f"q{queues}" if table.how == "tap" else "")
            first, count = len(vifs), 1 if table.how in BRIDGES else 2
            memory = 16 + 2 * queues * (SMALL_SET >> 20)
            vifs += [bed.vif(bridge, memory_mib=memory, queues=queues) for _ in range(count)]
            paths[queues] = [first, first + 1 if count == 2 else -1]
            if table.how == "tap":
                up(bridge.partition(":")[2])
        guest = bed.net_guest(vifs, {front}, SMALL_SET)
        measures: dict[str, Measure] = {
            _name(table, cell): partial(_run, guest, bed.pid, cell, paths[cell.queues]) for cell in table.cells
        }
        for take in measures.values():
            take(WARM_SECONDS / PART)
        yield measures


def _run(guest: Agent, switch: int, cell: Traffic, path: list[int], seconds: float) -> Run:
    tell, hear = turn([guest], [{**plan_of(cell, spin=True), "paths": [path]}], switch)
    tell(seconds)
    return hear()
