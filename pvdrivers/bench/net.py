"""`pvdrivers bench net`: packets from guest to guest, to nobody and to a TAP, beside DPDK, memcpy and veth.

Ours is the whole path: rings, grants and event channels of the embedded Xen, a `serve` process with the switch, and the
packet generator of pvdrivers/frontends/net_load.py in another process, which drives both guests on one core as testpmd
drives both of its ports; separate guests' processes are measured beside that. All sides stand ready and work in turns,
as in `blk`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import report
from .agent import Agent
from .bed import Bed
from .machine import Missing, load_note, program, two_cpus
from .net_rows import GSO, ROWS, Figure, NetWork, Traffic
from .peers.iperf import Veth
from .peers.memcpy import Memcpy
from .peers.testpmd import Testpmd
from .turns import Measure, Run, in_turns

__all__ = ["run"]

PAIRS, PAIRS_QUICK = 9, 3
SECONDS, SECONDS_QUICK = 2.0, 1.0
_SPIN_US, _SPIN_LOOKS = 1000, 20_000
_WARM_SECONDS = 0.2
_ON_WAY = 512  # packets, at the most
_BRIDGES = {"null": "null:", "tap": f"tap:pvdb{os.getpid()}"}
_STREAMS = 64  # of each queue, where there are several to spread over


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
    for work in ROWS:
        if only is not None and work.key not in only:
            continue
        for row in _measure(work, pairs, seconds):
            rows.append(row)
            say(report.text([row]).splitlines()[-1])
    return rows


def _measure(work: NetWork, pairs: int, seconds: float) -> list[dict[str, Any]]:
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        try:
            measures: dict[str, Measure] = {"": stack.enter_context(_ours(work.ours))}
        except Missing as e:
            return [_lacking(work, figure, str(e)) for figure in work.rows]
        for name, what in work.peers.items():
            try:
                side = _ours(what) if isinstance(what, Traffic) else _peer(what, work.ours)
                measures[name] = stack.enter_context(side)
            except Missing as e:
                missing[name] = str(e)
        runs = in_turns(measures, pairs, seconds)
    note = "; ".join(filter(None, (_loss(runs[""]), load_note()))) or None
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
        where = what.where if isinstance(what, Traffic) else _PLACES[what]
        return report.row_of_pairs(
            figure.what, figure.beside, runs[""], runs[figure.beside], key=figure.key, unit=figure.unit,
            theirs_where=where, **common,
        )  # fmt: skip
    row = report.row_of_values(
        figure.what, [run[figure.key] * figure.scale for run in runs[""]], unit=figure.unit, **common
    )
    return {**row, "ours_cpu_us": report.median_of(runs[""], "cpu_us"), "runs": runs[""]}


def _loss(runs: Sequence[Run]) -> str | None:
    sent, got = sum(run["sent"] for run in runs), sum(run["requests"] for run in runs)
    on_way = _ON_WAY * len(runs)  # when the time was over
    return f"{100 * (sent - got) / sent:.0f} % lost" if sent - got > max(on_way, sent / 100) else None


def _lacking(work: NetWork, figure: Figure, what: str) -> dict[str, Any]:
    return {"work": figure.what, "beside": figure.beside or None, "key_of_row": work.key, "missing": what}


# The sides: context managers that have everything ready, and yield what does one run.


@contextlib.contextmanager
def _ours(traffic: Traffic) -> Iterator[Measure]:
    with contextlib.ExitStack() as stack:
        tell, hear = stack.enter_context(_side(traffic))

        def measure(seconds: float) -> Run:
            tell(seconds)
            return hear()

        measure(_WARM_SECONDS)
        yield measure


_Side = tuple[Callable[[float], None], Callable[[], Run]]


@contextlib.contextmanager
def _side(traffic: Traffic) -> Iterator[_Side]:
    """A switch with its guests: what begins a run, and what waits for its figures."""
    cpus = two_cpus()
    pairs = cpus[: traffic.pairs] if traffic.how == "pairs" else ()
    back, front = (set(pairs), set(pairs)) if pairs else ({cpus[0]}, {cpus[1]})
    queues = len(pairs) or traffic.queues
    spin = not pairs and traffic.how != "apart"
    count = 1 if traffic.how in ("null", "tap") else 2
    memory = 16 + 2 * queues * (traffic.working_set >> 20)
    with contextlib.ExitStack() as stack:
        workers = len(pairs) or 1
        bed = stack.enter_context(Bed(cpus=back, workers=workers, spin_us=_SPIN_US if spin else 0, classes=["vif"]))
        if pairs:
            bed.pin_workers(pairs)
        bridge = _BRIDGES.get(traffic.how, "switch:bench")
        vifs = [bed.vif(bridge, memory_mib=memory, queues=queues) for _ in range(count)]
        if traffic.how == "tap":
            _up(bridge.partition(":")[2])
        plan = {
            "size": traffic.size, "gso_size": traffic.gso_size, "look": traffic.look,
            "streams": _STREAMS if traffic.queues > 1 else 1, "spin": _SPIN_LOOKS if spin else 0,
        }  # fmt: skip
        if traffic.one_at_a_time:
            plan["on_way"] = 1
        if traffic.how == "apart":
            guests = [bed.net_guest([vif], front, traffic.working_set) for vif in vifs]
            plans = [{**plan, "paths": [[0, -1]], "to": vifs[1]["mac"]}, {**plan, "paths": [[-1, 0]]}]
        else:
            guests = [bed.net_guest(vifs, front, traffic.working_set, pairs=pairs)]
            paths = {"both": [[0, 1], [1, 0]], "null": [[0, -1]], "tap": [[0, -1]]}.get(traffic.how, [[0, 1]])
            plans = [{**plan, "paths": paths}]
        yield _turn(guests, plans, bed.pid)


def _turn(guests: Sequence[Agent], plans: Sequence[dict[str, Any]], switch: int) -> _Side:
    """The last of the guests is the one that receives, and has an eye on the switch."""

    def tell(seconds: float) -> None:
        for guest, plan in zip(guests, plans):
            watch = [switch] if guest is guests[-1] else []
            guest.tell({"run": {**plan, "seconds": seconds}, "watch": watch})

    def hear() -> Run:
        *others, last = [guest.hear(60.0) for guest in guests]
        for other in others:
            last["sent"] += other["sent"]
            if last["requests"]:
                last["cpu_us"] += other["cpu_seconds"] / last["requests"] * 1e6
        return last

    return tell, hear


def _up(name: str) -> None:
    """A TAP that the backend has made takes what comes, and this host throws it away."""
    done = subprocess.run([program("ip", "iproute2"), "link", "set", name, "up"], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"ip link set {name} up: {done.stderr.strip()}")


@contextlib.contextmanager
def _peer(kind: str, traffic: Traffic) -> Iterator[Measure]:
    cpus = two_cpus()
    if kind == "memcpy":
        yield Memcpy(traffic.size, traffic.working_set, {cpus[0]}).run
    elif kind == "veth":
        with Veth(cpus) as veth:
            yield veth.run
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


_PLACES = {
    "testpmd": "vhost ports on a core, virtio-user ports on the other",
    "memcpy": "on a core",
    "veth": "client and server on a core each",
}
assert GSO > 4096
