"""The shards of a switch, as the control side makes them: memory for each worker, links between them, inboxes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pvdrivers.device import DeviceId
from pvdrivers.errors import PvError
from pvdrivers.iovec import IOVEC_SIZE
from pvdrivers.worker.control import Memory, RingHandle, Worker
from pvdrivers.worker.records import STATS
from rings.jit import address_of
from rings.netif import TX_ENTRY_SIZE
from rings.ring import RING_END

from . import inbox
from .link import EVENT_AT, INBOX, LINK, LINK_BYTES
from .records import (
    BATCH,
    COMMON,
    CUT_BYTES,
    DELIVERY,
    HEADROOM,
    MAX_DELIVERIES,
    MOST_PIECES,
    PACKET,
    STRIDE,
    SWITCH,
    TABLE_BITS,
    TABLE_ENTRY,
)

__all__ = ["Shard", "Shards"]

_RING_SLOTS = 256
_UNASKED = 1 << 30
"""RING_END.credit of an inbox: whatever is there is legal."""


class Shard:
    """What one worker has of a switch. `record` is its SWITCH."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.record = np.zeros(1, SWITCH)
        self.handle: RingHandle | None = None
        """Of its inbox, if there are other shards."""
        self.keep: list[Any] = []
        row = self.record[0]
        row["table"] = self.new(TABLE_ENTRY.itemsize << TABLE_BITS)
        row["slots"] = self.new(_RING_SLOTS * TX_ENTRY_SIZE)
        row["deliveries"] = self.new(MAX_DELIVERIES * DELIVERY.itemsize)
        row["scratch"] = self.new(64)
        row["pieces"] = self.new(MOST_PIECES * IOVEC_SIZE)
        packets = np.zeros(BATCH, PACKET)
        row["data"] = self.new(BATCH * STRIDE)
        packets["data"] = int(row["data"]) + HEADROOM + np.arange(BATCH) * STRIDE
        self.keep.append(packets)
        row["packets"] = packets.ctypes.data
        row["parcel"] = self.new(PACKET.itemsize)
        row["cuts"] = self.new(CUT_BYTES)

    def new(self, size: int) -> int:
        """The address of so many bytes, zeroed."""
        return self.new_memory(size).address

    def new_memory(self, size: int) -> Memory:
        """So many bytes, zeroed."""
        memory = Memory(size)
        self.keep.append(memory)
        return memory

    @property
    def address(self) -> int:
        """The address of the SWITCH."""
        return int(self.record.ctypes.data)


class Shards:
    """All of one switch, a worker each. With several of them close() is to be called when no port is left."""

    violations: dict[int, str] = {}

    def __init__(self, name: str, workers: list[Worker], link_bytes: int = LINK_BYTES) -> None:
        """Raises PvError without a descriptor, or a ring of a worker, more."""
        self.ident = DeviceId(0, f"switch-{name}", 0, 0, "")  # nobody's in the store
        self.all = [Shard(worker) for worker in workers]
        self._common = Memory(COMMON.itemsize)
        self._fds: list[int] = []
        n = len(self.all)
        for s, shard in enumerate(self.all):
            row = shard.record[0]
            row["shard"], row["shards"], row["common"] = s, n, self._common.address
            row["peers"][:n] = [peer.address for peer in self.all]
        if n > 1:
            inboxes = [shard.new_memory(INBOX.itemsize) for shard in self.all]
            for s, shard in enumerate(self.all):
                for t, there in enumerate(inboxes):
                    if t != s:
                        shard.record[0]["links"][t] = _new_link(shard, there.address, link_bytes)
            try:
                for shard, memory in zip(self.all, inboxes):
                    self._fill_inbox(shard, memory)
            except BaseException:
                self.close()
                raise

    @property
    def common(self) -> int:
        """The address of the COMMON."""
        return self._common.address

    def _fill_inbox(self, shard: Shard, memory: Memory) -> None:
        try:
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as e:
            raise PvError(f"a switch: {e.strerror}; raise the limit of open files") from e
        self._fds.append(fd)
        own = int(shard.record[0]["shard"])
        ia, row = memory.address, memory.array(INBOX, 1)[0]
        row["fd"] = fd
        row["links"][: len(self.all)] = [peer.record[0]["links"][own] for peer in self.all]
        end, stats = np.zeros(1, RING_END), np.zeros(1, STATS)
        shard.keep += [end, stats]
        end[0]["peer_prod"], end[0]["peer_event"] = ia, ia + EVENT_AT
        end[0]["credit"] = _UNASKED
        handle = shard.worker.new_ring(self, -1)
        shard.handle = handle
        ring = handle.record
        ring["event_fd"], ring["end"], ring["stats"] = fd, end.ctypes.data, stats.ctypes.data
        ring["priv"], ring["local"] = ia, shard.address
        ring["step"], ring["finish"] = address_of(inbox.step_inbox), address_of(inbox.finish_inbox)

    def start(self) -> None:
        """Have the workers serve the inboxes."""
        for shard in self.all:
            if shard.handle is not None:
                shard.worker.attach(shard.handle)

    def come_round(self) -> None:
        """When this returns no pass is under way that had begun before."""
        for shard in self.all:
            shard.worker.come_round()

    def close(self) -> None:
        """No port is left. Harmless a second time."""
        for shard in self.all:
            if shard.handle is not None:
                shard.worker.detach(shard.handle)
                shard.handle = None
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _new_link(shard: Shard, inbox_address: int, size: int) -> int:
    """The address of a LINK from a shard to an inbox."""
    memory = shard.new_memory(LINK.itemsize)
    row = memory.array(LINK, 1)[0]
    row["data"], row["size"], row["inbox"] = shard.new(size), size, inbox_address
    return memory.address
