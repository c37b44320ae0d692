"""The guest's process of a measurement: disks of one or several domains, and loads on them when told.

First line: run_dir, and disks: domid, token, devid, and what else Blkfront takes. Commands:
    {"run": PLAN, "disk": 0, "watch": [pid...]}   a load, to its end; the answer has its figures
    {"start": PLAN, "disk": 0}, {"finish": true}  a load in the background, and its figures
    {"poke": [disk...], "per_second": N}          every so often one read on each, until {"rest": true}
PLAN: the fields of pvdrivers.frontends.load.Plan.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.frontends.load import Ledger, Load, Plan, Result
from pvdrivers.frontends.watches import Watches
from pvdrivers.platform import open_platform
from pvdrivers.worker.histogram import bucket_floor, percentile

from .agent import Answer, Spent, answer

__all__ = ["figures", "main"]

_CONNECT_SECONDS = 60.0
_DRAIN_SECONDS = 30.0


def figures(hist: Any, requests: int, seconds: float, cpu: float | None) -> dict[str, Any]:
    """What an agent answers about a load: a rate, latencies in microseconds, CPU microseconds a request."""
    count = int(hist.sum())
    total = sum(int(n) * (bucket_floor(i) + bucket_floor(i + 1)) / 2 for i, n in enumerate(hist) if n)
    return {
        "rate": requests / seconds if seconds > 0 else 0.0,
        "requests": requests,
        "seconds": seconds,
        "p50_us": percentile(hist, 0.5) / 1000,
        "p99_us": percentile(hist, 0.99) / 1000,
        "mean_us": total / count / 1000 if count else float("nan"),
        "cpu_us": None if cpu is None or not requests else cpu / requests * 1e6,
    }


class _Guest:
    """The disks of this process."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._disks: list[Blkfront] = []
        self._platforms: dict[int, Any] = {}
        self._watches: dict[int, Watches] = {}
        self._ledgers: dict[tuple[int, int], Ledger] = {}
        self._background: tuple[Load, Spent] | None = None
        self._resting = threading.Event()
        self._pokers: list[threading.Thread] = []
        for disk in setup["disks"]:
            options = dict(disk)
            domid, token, devid = options.pop("domid"), options.pop("token"), options.pop("devid")
            if domid not in self._platforms:
                self._platforms[domid] = open_platform("sim", run_dir=setup["run_dir"], domid=domid, token=token)
                self._watches[domid] = Watches(self._platforms[domid].store)
            front = Blkfront(self._platforms[domid], devid, watches=self._watches[domid], **options)
            front.connect(_CONNECT_SECONDS)
            self._disks.append(front)

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command."""
        if "run" in command:
            load, spent = self._load(command["disk"], command["run"]), Spent(*command.get("watch", ()))
            return self._told(load.run(command["run"]["seconds"] + _DRAIN_SECONDS), spent)
        if "start" in command:
            load = self._load(command["disk"], command["start"])
            self._background = load, Spent()
            load.start()
            return {}
        if "finish" in command:
            assert self._background is not None
            load, spent = self._background
            load.stop()
            return self._told(load.wait(_DRAIN_SECONDS), spent)
        if "poke" in command:
            self._resting.clear()
            pause = 1 / command["per_second"]
            self._pokers = [
                threading.Thread(target=self._poke, args=(self._disks[i], pause), daemon=True) for i in command["poke"]
            ]
            for thread in self._pokers:
                thread.start()
            return {}
        if "rest" in command:
            self._resting.set()
            for thread in self._pokers:
                thread.join()
            return {}
        return {"failure": f"{command}: no such command"}

    def _load(self, index: int, plan: dict[str, Any]) -> Load:
        disk, wanted = self._disks[index], Plan(**plan)
        key = index, wanted.block_size
        if key not in self._ledgers:
            self._ledgers[key] = Ledger(disk.info.size, wanted.block_size)
        return Load(disk, wanted, self._ledgers[key])

    def _told(self, result: Result, spent: Spent) -> dict[str, Any]:
        cpu = spent.seconds()
        if result.errors:
            return {"failure": f"{result.errors} of {result.requests} requests failed, first {result.first_error}"}
        return {
            **figures(result.hist, result.requests, result.seconds, cpu),
            "bytes_per_second": result.bytes_per_second,
            "notify_sent": result.notify_sent,
            "notify_saved": result.notify_saved,
        }

    def _poke(self, disk: Blkfront, pause: float) -> None:
        offset = 0
        while not self._resting.wait(pause):
            disk.read(offset, 4096)
            offset = (offset + 1044480) % (disk.info.size - 4096) & -4096

    def close(self) -> None:
        """Close what is open."""
        self._resting.set()
        for disk in self._disks:
            disk.close(timeout=5.0)
        for watches in self._watches.values():
            watches.close()
        for platform in self._platforms.values():
            platform.close()


def _start(setup: dict[str, Any]) -> tuple[Answer, Any]:
    guest = _Guest(setup)
    return guest.handle, guest.close


def main() -> int:
    return answer(_start)


if __name__ == "__main__":
    sys.exit(main())
