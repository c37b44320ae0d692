"""Switches of this process, and the ports that come and go while their workers forward.

A switch has a shard for each of its workers (see `shards`), which works on that alone. A port has its queues in one or
more of them, and every shard knows every port, under the same index. A port leaves in this order: it is taken from
all shards, all their workers come round, then its rings are detached; after that no pass can be under way that still
knows it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pvdrivers.errors import ConfigError, PvError
from pvdrivers.worker.control import Worker
from pvdrivers.worker.pool import WorkerPool
from pvdrivers.worker.words import store_word

from .kept_file import KeptFile
from .link import LINK_BYTES, WIRE_BYTES
from .records import GROUPS, JOINS_AT, LIMIT, MAX_PORTS, MAX_SHARDS, PORT, SWITCH
from .shards import Shard, Shards

__all__ = ["AddressTaken", "Port", "Switch", "find_switch"]


class AddressTaken(ConfigError):
    """The address of a port is that of another, whose guest is domain `domid`."""

    def __init__(self, text: str, domid: int) -> None:
        super().__init__(text)
        self.domid = domid


@dataclass
class Port:
    """One port. `record` is its PORT."""

    label: str
    mac: int = 0
    vlan: int = 0
    trunk: frozenset[int] | None = None
    record: np.ndarray = field(default_factory=lambda: np.zeros(1, PORT))
    limits: np.ndarray = field(default_factory=lambda: np.zeros(2, LIMIT))
    """From the guest, and to it: LIMITs."""
    groups: Any = field(default_factory=lambda: np.zeros(1, GROUPS))
    """What its guest listens to, or what holds that: see use_groups()."""
    home: int = 0
    """The shard of its queue 0, see Switch.settle(), and of how many queues it was settled."""
    queues: int = 0

    def __post_init__(self) -> None:
        row = self.record[0]
        row["from_guest"] = self.limits.ctypes.data
        row["to_guest"] = self.limits.ctypes.data + LIMIT.itemsize
        row["groups"] = self.groups.ctypes.data

    def use_groups(self, kept: KeptFile | None) -> None:
        """Have its GROUPS there from now on; None: in memory of its own. No worker knows the port."""
        self.groups = np.zeros(1, GROUPS) if kept is None else kept
        self.record[0]["groups"] = self.groups.ctypes.data if kept is None else kept.address

    @property
    def address(self) -> int:
        """The address of the PORT."""
        return int(self.record.ctypes.data)


class Switch:
    """A switch, or with `wire` two ports that are each other's other side. Its workers forward for it, a shard each."""

    def __init__(self, name: str, workers: Sequence[Worker], *, wire: bool = False) -> None:
        """Raises PvError without a descriptor, or a ring of a worker, more."""
        self.name, self._wire = name, wire
        self._shards = Shards(name, list(workers[:MAX_SHARDS]), WIRE_BYTES if wire else LINK_BYTES)
        self.shards = self._shards.all
        self.uplink: Any = None
        """Its Uplink, if it has one."""
        self._lock = threading.Lock()
        self._ports: dict[int, Port] = {}
        self._epoch = 0
        self._load = [0] * len(self.shards)  # queues of each
        for shard in self.shards:
            shard.record[0]["wire"] = wire
        self._shards.start()

    def settle(self, port: Port, queues: int) -> None:
        """Choose where a port's queues are, so that each shard has as many as the others."""
        with self._lock:
            self._count(port, -1)
            port.home, port.queues = self._load.index(min(self._load)), queues
            self._count(port, 1)
            port.record[0]["home"] = port.home
            port.limits["shared"] = min(queues, len(self.shards)) > 1
            for name in ("holder", "waiting", "turn", "passed"):
                port.limits[name] = 0

    def _count(self, port: Port, one: int) -> None:
        for q in range(port.queues):
            self._load[(port.home + q) % len(self._load)] += one

    def shard_of(self, port: Port, queue: int) -> Shard:
        """Where a queue of a port lies that has settled."""
        return self.shards[(port.home + queue) % len(self.shards)]

    def come_round(self) -> None:
        """When this returns none of its workers is in a pass that had begun before."""
        self._shards.come_round()

    def join(self, port: Port) -> None:
        """Give a port an index. AddressTaken if its address is that of another, PvError if there is no room."""
        with self._lock:
            for other in self._ports.values():
                same = port.vlan == other.vlan or port.trunk is not None or other.trunk is not None
                if port.mac and other.mac == port.mac and same:
                    raise AddressTaken(
                        f"{port.label}: its address {mac_text(port.mac)} is that of {other.label} on switch"
                        f" {self.name}; give it another `mac`",
                        int(other.record[0]["domid"]),
                    )
            free = [i for i in range(MAX_PORTS) if i not in self._ports]
            if not free:
                raise PvError(f"{port.label}: switch {self.name} has {MAX_PORTS} ports already; name another switch")
            index = free[0]
            self._epoch += 1
            row = port.record[0]
            row["index"], row["epoch"], row["mac"] = index, self._epoch, port.mac
            row["joined"], row["learned"] = 0, 0
            row["vlan"], row["trunk"], row["allowed"] = port.vlan, port.trunk is not None, _bits(port.trunk or ())
            self._ports[index] = port
            for shard in self.shards:
                if port.vlan or port.trunk is not None:
                    shard.record[0]["vlans"] = 1
                shard.record[0]["top"] = max(int(shard.record[0]["top"]), index + 1)
                # Release: who sees the port sees what is in it.
                store_word(shard.address + index * 8, port.address)
            # ... and who sees the count sees the port.
            store_word(self._shards.common + JOINS_AT, self._epoch)

    def leave(self, port: Port) -> None:
        """When this returns nothing more is sent to it, and no worker but those of its rings knows it. Harmless a
        second time."""
        with self._lock:
            self._count(port, -1)
            port.queues = 0
            index = int(port.record[0]["index"])
            if self._ports.get(index) is not port:
                return
            for shard in self.shards:
                store_word(shard.address + index * 8, 0)
        if len(self.shards) > 1:
            self.come_round()
        with self._lock:
            if self._ports.get(index) is port:  # not before: a pass that has it yet takes whoever has it for this one
                del self._ports[index]

    def close(self) -> None:
        """A wire whose ports have left; another switch stays. Harmless a second time."""
        if self._wire and not self._ports:
            self._shards.close()


def _bits(vlans: Iterable[int]) -> np.ndarray:
    """PORT.allowed"""
    bits = np.zeros(128, np.uint32)
    for vlan in vlans:
        bits[vlan >> 5] |= np.uint32(1 << (vlan & 31))
    return bits


def mac_text(mac: int) -> str:
    """As people write it."""
    return ":".join(f"{byte:02x}" for byte in mac.to_bytes(6, "little"))


_switches: WeakKeyDictionary[WorkerPool, dict[str, Switch]] = WeakKeyDictionary()
_switches_lock = threading.Lock()


def find_switch(pool: WorkerPool, name: str) -> Switch:
    """The switch of a name, which has all workers, as far as a switch may have so many."""
    with _switches_lock:
        mine = _switches.setdefault(pool, {})
        if name not in mine:
            # What one queue will do for is with each worker in turn, switch by switch.
            first = pool.workers.index(pool.choose(1)[0])
            mine[name] = Switch(name, [*pool.workers[first:], *pool.workers[:first]])
        return mine[name]


assert SWITCH.fields is not None and SWITCH.fields["ports"][1] == 0
