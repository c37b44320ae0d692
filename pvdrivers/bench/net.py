"""`pvdrivers bench net`: packets from guest to guest, to nobody and to a TAP, beside DPDK, memcpy, veth and bare loops.

Ours is the whole path: rings, grants and event channels of the embedded Xen, a `serve` process with the switch, and the
packet generator of pvdrivers/frontends/net_load.py in another process, which drives both guests on one core as testpmd
drives both of its ports; separate guests' processes are measured beside that. All sides stand ready and work in turns,
as in `blk`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import report
from .machine import Missing, load_note, two_cpus
from .net_rows import GSO, ROWS, Figure, NetWork, Traffic
from .net_sides import ON_WAY, ours
from .net_table import TABLES, Table, measure
from .peers.iperf import Ring, Spliced, Veth
from .peers.memcpy import Memcpy
from .peers.testpmd import Testpmd
from .turns import Measure, Run, in_turns

__all__ = ["run"]

PAIRS, PAIRS_QUICK = 9, 2
SECONDS, SECONDS_QUICK = 2.0, 0.5


def run(
    quick: bool = False,
    *,
    pairs: int | None = None,
    seconds: float | None = None,
    only: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure every row, or those of the works whose `key` is in `only`; the rows in the form of report.py."""
    pairs = pairs or (PAIRS_QUICK if quick else PAIRS)
    seconds = seconds or (SECONDS_QUICK if quick else SECONDS)
    rows: list[dict[str, Any]] = []
    works: list[NetWork | Table] = [*ROWS, *TABLES]
    for work in works:
        if only is not None and work.key not in only:
            continue
        took = _measure(work, pairs, seconds) if isinstance(work, NetWork) else measure(work, pairs, seconds)
        for row in took:
            rows.append(row)
            say(report.text([row]).splitlines()[-1])
    return rows


def _measure(work: NetWork, pairs: int, seconds: float) -> list[dict[str, Any]]:
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        try:
            measures: dict[str, Measure] = {"": stack.enter_context(_side(work.ours, work.ours))}
        except Missing as e:
            return [_lacking(work, figure, str(e)) for figure in work.rows]
        for name, what in work.peers.items():
            try:
                measures[name] = stack.enter_context(_side(what, work.ours))
            except Missing as e:
                missing[name] = str(e)
        runs = in_turns(measures, pairs, seconds)
    note = "; ".join(filter(None, (work.note, _loss(runs[""]), load_note()))) or None
    return [
        _lacking(work, figure, missing[figure.beside])
        if figure.beside in missing
        else _row(work, figure, runs, note)
        for figure in work.rows
    ]


def _row(work: NetWork, figure: Figure, runs: dict[str, list[Run]], note: str | None) -> dict[str, Any]:
    common: dict[str, Any] = {
        "target": figure.target, "sense": figure.sense, "key_of_row": work.key, "ours_where": work.ours.where,
        "working_set": work.ours.working_set, "note": note,
    }  # fmt: skip
    if figure.beside:
        what = work.peers[figure.beside]
        where = what.where if isinstance(what, Traffic) else _place(what, work.ours)
        return report.row_of_pairs(
            figure.what, figure.beside, runs[""], runs[figure.beside], key=figure.key, unit=figure.unit,
            theirs_where=where, **common,
        )  # fmt: skip
    row = report.row_of_values(
        figure.what, [run[figure.key] * figure.scale for run in runs[""]], unit=figure.unit, **common
    )
    return {**row, "ours_cpu_us": report.median_of(runs[""], "cpu_us"), "runs": runs[""]}


def _loss(runs: Sequence[Run]) -> str | None:
    if "sent" not in runs[0]:
        return None
    sent, got = sum(run["sent"] for run in runs), sum(run["requests"] for run in runs)
    on_way = ON_WAY * len(runs)  # when the time was over
    return f"{100 * (sent - got) / sent:.0f} % lost" if sent - got > max(on_way, sent / 100) else None


def _lacking(work: NetWork, figure: Figure, what: str) -> dict[str, Any]:
    return {"work": figure.what, "beside": figure.beside or None, "key_of_row": work.key, "missing": what}


def _side(what: str | Traffic, traffic: Traffic) -> contextlib.AbstractContextManager[Measure]:
    if isinstance(what, Traffic) and what.how != "iperf":
        return ours(what)
    return _peer(what if isinstance(what, str) else "ring", traffic)


@contextlib.contextmanager
def _peer(kind: str, traffic: Traffic) -> Iterator[Measure]:
    cpus = two_cpus()
    if kind == "memcpy":
        yield Memcpy(traffic.size, traffic.working_set, {cpus[0]}).run
    elif kind == "asked":
        asked = {"path0": traffic.rate, "path1": traffic.rate, "rate": 0.0, "requests": 0}
        yield lambda seconds: {**asked, "seconds": seconds}
    elif kind == "veth" and traffic.how != "iperf":
        with Veth(cpus) as veth:
            yield veth.run
    elif kind in _BETWEEN:
        with _BETWEEN[kind]() as between:
            yield between.both
    else:
        with Testpmd(traffic.size, cpus) as testpmd:
            testpmd.pause()

            def measure(seconds: float) -> Run:
                testpmd.go_on()
                try:
                    return testpmd.run(seconds)
                finally:
                    testpmd.pause()

            yield measure


def _place(kind: str, traffic: Traffic) -> str:
    return "anywhere" if traffic.how == "iperf" else _PLACES[kind]


_BETWEEN: dict[str, type[Ring | Spliced | Veth]] = {"ring": Ring, "spliced": Spliced, "veth": Veth}
_PLACES = {
    "testpmd": "vhost ports on a core, virtio-user ports on the other",
    "memcpy": "on a core",
    "veth": "client and server on a core each",
    "asked": "",
}
assert GSO > 4096
