"""The guests' process of a measurement of networks: vifs of one or several domains, and loads on them when told.

First line: run_dir, working_set (bytes) and staging, see Generator, and vifs: domid, token, mac, and what else Netfront
takes.
Commands: {"run": PLAN, "watch": [pid...]}, a load to its end; the answer has its figures. PLAN: the fields of
pvdrivers.frontends.net_load.NetPlan. The first process that is watched is the switch.

`pairs` of the first line is a list of cores: then queue k of all vifs has a load of its own, in a thread on the k-th.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pvdrivers.frontends.net_load import Generator, NetPlan, NetResult
from pvdrivers.frontends.netfront import Netfront
from pvdrivers.frontends.netfront_keys import Wishes
from pvdrivers.platform import open_platform

from .agent import Answer, answer
from .guest import figures
from .machine import cpu_seconds

__all__ = ["main", "slots_of"]

_CONNECT_SECONDS = 60.0


def slots_of(plan: NetPlan) -> int:
    """Of each packet, on a ring."""
    return -(-plan.size // 4096) + (1 if plan.gso_size else 0)


def _told(plan: NetPlan, result: NetResult, own: float, watched: list[float]) -> dict[str, Any]:
    """The figures of a load; `path0` and so on: bytes a second that came by that path. What goes to nobody of this
    process counts when its sender has the answer."""
    if result.errors or result.wrong:
        return {"failure": f"{result.errors} errors, {result.wrong} packets with wrong bytes"}
    here = any(target >= 0 for _, target in plan.paths)
    packets = result.received if here else result.answered // slots_of(plan)
    found = figures(result.hist, packets, result.seconds, own + sum(watched))
    return {
        **found,
        "bytes_per_second": packets * plan.size / result.seconds,
        **{f"path{k}": nbytes / result.seconds for k, nbytes in enumerate(result.path_bytes)},
        "switch_ns": watched[0] / packets * 1e9 if watched and packets else None,
        "sent": result.sent,
        "lost_slots": result.lost,
        "cpu_seconds": own + sum(watched),
    }


def together(generators: Sequence[Generator], cpus: Sequence[int], plan: NetPlan) -> NetResult:
    """Run all of them at the same time, each on its core; one without a core runs here. The sum of it."""
    if not cpus:
        return generators[0].run(plan)

    def run(generator: Generator, cpu: int) -> NetResult:
        os.sched_setaffinity(0, {cpu})  # of this thread
        return generator.run(plan)

    with ThreadPoolExecutor(len(cpus)) as pool:
        results = list(pool.map(run, generators, cpus))
    counts = ("sent", "received", "received_bytes", "answered", "lost", "errors", "wrong")
    return NetResult(
        max(one.seconds for one in results),
        **{name: sum(getattr(one, name) for one in results) for name in counts},
        path_bytes=tuple(map(sum, zip(*(one.path_bytes for one in results)))),
        hist=sum((one.hist for one in results[1:]), results[0].hist),
    )


def _start(setup: dict[str, Any]) -> tuple[Answer, Callable[[], None]]:
    platforms, vifs = [], []
    for vif in setup["vifs"]:
        options = {key: value for key, value in vif.items() if key not in ("domid", "token", "mac")}
        platforms.append(
            open_platform("sim", run_dir=setup["run_dir"], domid=vif["domid"], token=bytes.fromhex(vif["token"]))
        )
        vifs.append(Netfront(platforms[-1], 0, wishes=Wishes(staging=False), **options))  # its own pages are not used
        vifs[-1].connect(_CONNECT_SECONDS)
    cpus = setup.get("pairs") or []
    generators = [
        Generator(vifs, working_set=setup["working_set"], queue=k if cpus else None, staging=setup["staging"])
        for k in range(len(cpus) or 1)
    ]

    def handle(command: dict[str, Any]) -> dict[str, Any]:
        plan, pids = NetPlan(**command["run"]), ["self", *command.get("watch", ())]
        before = [cpu_seconds(pid) for pid in pids]
        result = together(generators, cpus, plan)
        own, *watched = (cpu_seconds(pid) - since for pid, since in zip(pids, before))
        return _told(plan, result, own, watched)

    def close() -> None:
        for generator in generators:
            generator.close()
        for platform in platforms:
            platform.close()

    return handle, close


def main() -> int:
    return answer(_start)


if __name__ == "__main__":
    sys.exit(main())
