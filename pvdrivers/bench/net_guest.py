"""The guests' process of a measurement of networks: vifs of one or several domains, and loads on them when told.

First line: run_dir, working_set (bytes, see Generator), and vifs: domid, token, mac, and what else Netfront takes.
Commands: {"run": PLAN, "watch": [pid...]}, a load to its end; the answer has its figures. PLAN: the fields of
pvdrivers.frontends.net_load.NetPlan. The first process that is watched is the switch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pvdrivers.frontends.net_load import Generator, NetPlan, NetResult
from pvdrivers.frontends.netfront import Netfront
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


def _start(setup: dict[str, Any]) -> tuple[Answer, Callable[[], None]]:
    platforms, vifs = [], []
    for vif in setup["vifs"]:
        options = {key: value for key, value in vif.items() if key not in ("domid", "token", "mac")}
        platforms.append(
            open_platform("sim", run_dir=setup["run_dir"], domid=vif["domid"], token=bytes.fromhex(vif["token"]))
        )
        vifs.append(Netfront(platforms[-1], 0, **options))
        vifs[-1].connect(_CONNECT_SECONDS)
    generator = Generator(vifs, working_set=setup["working_set"])

    def handle(command: dict[str, Any]) -> dict[str, Any]:
        plan, pids = NetPlan(**command["run"]), ["self", *command.get("watch", ())]
        before = [cpu_seconds(pid) for pid in pids]
        result = generator.run(plan)
        own, *watched = (cpu_seconds(pid) - since for pid, since in zip(pids, before))
        return _told(plan, result, own, watched)

    def close() -> None:
        generator.close()
        for platform in platforms:
            platform.close()

    return handle, close


def main() -> int:
    return answer(_start)


if __name__ == "__main__":
    sys.exit(main())
