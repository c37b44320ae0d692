"""The sides of `pvdrivers bench net` that are ours: context managers that have everything ready, and yield what does
one run."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .agent import Agent
from .bed import Bed
from .machine import Missing, program, two_cpus
from .net_rows import Traffic
from .turns import Measure, Run

__all__ = ["BRIDGES", "ON_WAY", "SPIN_US", "WARM_SECONDS", "ours", "plan_of", "turn", "up"]

ON_WAY = 512
"""Packets on their way, at the most."""
SPIN_US = 1000
WARM_SECONDS = 0.2
BRIDGES = {"null": "null:", "tap": f"tap:pvdb{os.getpid()}"}
_SPIN_LOOKS = 20_000
_STREAMS = 64  # of each queue, where there are several to spread over


def plan_of(traffic: Traffic, spin: bool) -> dict[str, Any]:
    """The fields of NetPlan that a traffic has, without its paths."""
    plan = {
        "size": traffic.size, "gso_size": traffic.gso_size, "look": traffic.look,
        "streams": _STREAMS if traffic.queues > 1 else 1, "spin": _SPIN_LOOKS if spin else 0,
    }  # fmt: skip
    return {**plan, "on_way": traffic.slots} if traffic.one_at_a_time else plan


@contextlib.contextmanager
def ours(traffic: Traffic) -> Iterator[Measure]:
    with contextlib.ExitStack() as stack:
        tell, hear = stack.enter_context(_side(traffic))

        def measure(seconds: float) -> Run:
            tell(seconds)
            return hear()

        measure(WARM_SECONDS)
        yield measure


Side = tuple[Callable[[float], None], Callable[[], Run]]


@contextlib.contextmanager
def _side(traffic: Traffic) -> Iterator[Side]:
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
        bed = stack.enter_context(Bed(cpus=back, workers=workers, spin_us=SPIN_US if spin else 0, classes=["vif"]))
        if pairs:
            bed.pin_workers(pairs)
        bridge = BRIDGES.get(traffic.how, "switch:bench")
        # Of a limited vif it is the first, so that the first path is from it and the second to it.
        keys = [{"rate": f"{traffic.rate // 1000},1000"} if traffic.rate else {}, {}][:count]
        vifs = [bed.vif(bridge, memory_mib=memory, keys=some, queues=queues) for some in keys]
        if traffic.how == "tap":
            up(bridge.partition(":")[2])
        plan = plan_of(traffic, spin)
        if traffic.how == "apart":
            guests = [bed.net_guest([vif], front, traffic.working_set, staging=traffic.staging) for vif in vifs]
            plans = [{**plan, "paths": [[0, -1]], "to": vifs[1]["mac"]}, {**plan, "paths": [[-1, 0]]}]
        else:
            guests = [bed.net_guest(vifs, front, traffic.working_set, pairs=pairs, staging=traffic.staging)]
            paths = {"both": [[0, 1], [1, 0]], "null": [[0, -1]], "tap": [[0, -1]]}.get(traffic.how, [[0, 1]])
            plans = [{**plan, "paths": paths}]
        yield turn(guests, plans, bed.pid)


def turn(guests: Sequence[Agent], plans: Sequence[dict[str, Any]], switch: int) -> Side:
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


def up(name: str) -> None:
    """A TAP that the backend has made takes what comes, and this host throws it away."""
    done = subprocess.run([program("ip", "iproute2"), "link", "set", name, "up"], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"ip link set {name} up: {done.stderr.strip()}")
