"""Switches of this process, and the ports that come and go while a worker forwards.

A switch and all rings of its ports belong to one worker: what the worker works on is changed by nobody else, but for
SWITCH.ports and PORT.n_out. A port leaves in this order: it is taken from the table, then its rings are detached, for
which the worker has to come round; after that no pass can be under way that still knows it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pvdrivers.errors import ConfigError, PvError
from pvdrivers.worker.control import Memory, Worker, WorkerPool
from pvdrivers.worker.words import store_word
from rings.netif import TX_ENTRY_SIZE

from .kept_file import KeptFile
from .records import (
    BATCH,
    CUT_BYTES,
    DELIVERY,
    GROUPS,
    HEADROOM,
    LIMIT,
    MAX_DELIVERIES,
    MAX_PORTS,
    PACKET,
    PORT,
    STRIDE,
    SWITCH,
    TABLE_BITS,
    TABLE_ENTRY,
)

__all__ = ["Port", "Switch", "find_switch"]

_RING_SLOTS = 256


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

    def __post_init__(self) -> None:
        row = self.record[0]
        row["from_guest"] = self.limits.ctypes.data
        row["to_guest"] = self.limits.ctypes.data + LIMIT.itemsize
        row["groups"] = self.groups.ctypes.data

    def use_groups(self, kept: KeptFile) -> None:
        """Have its GROUPS there from now on. No worker knows the port."""
        self.groups = kept
        self.record[0]["groups"] = kept.address

    @property
    def address(self) -> int:
        """The address of the PORT."""
        return int(self.record.ctypes.data)


class Switch:
    """A switch, or with `wire` two ports that are each other's other side. `worker` forwards for it."""

    def __init__(self, name: str, worker: Worker, *, wire: bool = False) -> None:
        self.name = name
        self.worker = worker
        self.record = np.zeros(1, SWITCH)
        self.uplink: Any = None
        """Its Uplink, if it has one."""
        self._keep: list[Any] = []
        self._lock = threading.Lock()
        self._ports: dict[int, Port] = {}
        self._epoch = 0
        row = self.record[0]
        row["wire"] = wire
        row["table"] = self._new(TABLE_ENTRY.itemsize << TABLE_BITS)
        row["slots"] = self._new(_RING_SLOTS * TX_ENTRY_SIZE)
        row["deliveries"] = self._new(MAX_DELIVERIES * DELIVERY.itemsize)
        row["scratch"] = self._new(64)
        packets = np.zeros(BATCH, PACKET)
        row["data"] = self._new(BATCH * STRIDE)
        packets["data"] = int(row["data"]) + HEADROOM + np.arange(BATCH) * STRIDE
        self._keep.append(packets)
        row["packets"] = packets.ctypes.data
        row["parcel"] = self._new(PACKET.itemsize)
        row["cuts"] = self._new(CUT_BYTES)

    def _new(self, size: int) -> int:
        memory = Memory(size)
        self._keep.append(memory)
        return memory.address

    @property
    def address(self) -> int:
        """The address of the SWITCH."""
        return int(self.record.ctypes.data)

    def join(self, port: Port) -> None:
        """Give a port an index. ConfigError if its address is that of another, PvError if there is no room."""
        with self._lock:
            for other in self._ports.values():
                same = port.vlan == other.vlan or port.trunk is not None or other.trunk is not None
                if port.mac and other.mac == port.mac and same:
                    raise ConfigError(
                        f"{port.label}: its address {mac_text(port.mac)} is that of {other.label} on switch"
                        f" {self.name}; give it another `mac`"
                    )
            free = [i for i in range(MAX_PORTS) if i not in self._ports]
            if not free:
                raise PvError(f"{port.label}: switch {self.name} has {MAX_PORTS} ports already; name another switch")
            index = free[0]
            self._epoch += 1
            row = port.record[0]
            row["index"], row["epoch"], row["switch"], row["mac"] = index, self._epoch, self.address, port.mac
            row["joined"] = row["learned"] = 0
            row["vlan"], row["trunk"], row["allowed"] = port.vlan, port.trunk is not None, _bits(port.trunk or ())
            if port.vlan or port.trunk is not None:
                self.record[0]["vlans"] = 1
            self._ports[index] = port
            self.record[0]["top"] = max(int(self.record[0]["top"]), index + 1)
            # Release: who sees the port sees what is in it.
            store_word(self.address + index * 8, port.address)

    def leave(self, port: Port) -> None:
        """Nothing more is sent to it from the worker's next pass on. Harmless a second time."""
        with self._lock:
            index = int(port.record[0]["index"])
            if self._ports.get(index) is port:
                store_word(self.address + index * 8, 0)
                del self._ports[index]


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
    """The switch of a name; a new one gets the worker whose turn it is."""
    with _switches_lock:
        mine = _switches.setdefault(pool, {})
        if name not in mine:
            mine[name] = Switch(name, pool.choose(1)[0])
        return mine[name]


assert SWITCH.fields is not None and SWITCH.fields["ports"][1] == 0
