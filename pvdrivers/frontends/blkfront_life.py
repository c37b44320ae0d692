"""The life of a disk on the guest's side: its rings, and what is in flight when they go. The states are `front`'s."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.errors import ConfigError
from pvdrivers.platform import Platform
from pvdrivers.xenbus import XenbusState
from rings import blkif
from rings.vdev import vdev_name

from . import blkfront_keys as keys
from .blkfront_io import most_bytes
from .blkfront_queue import Done, Queue
from .blkfront_records import IO
from .front import POLL, Frontend
from .watches import Watches

__all__ = ["Life"]


class Life(Frontend):
    """Everything of a disk but its requests."""

    kind = "vbd"
    noun = "disk"

    def __init__(
        self,
        platform: Platform,
        devid: int,
        *,
        queues: int | None,
        ring_order: int | None,
        abi: str,
        persistent: bool,
        indirect: bool | int,
        trusted: bool,
        watches: Watches | None,
    ) -> None:
        if abi not in keys.ABIS:
            raise ConfigError(f"abi {abi!r} is not one of {', '.join(keys.ABIS)}")
        if ring_order is not None and not 0 <= ring_order <= blkif.MAX_RING_PAGE_ORDER:
            raise ConfigError(f"ring order {ring_order} is not from 0 to {blkif.MAX_RING_PAGE_ORDER}")
        if queues is not None and queues < 1:
            raise ConfigError(f"{queues} queues: there is at least one")
        super().__init__(platform, devid, vdev_name(devid), watches)
        self.info: keys.DiskInfo = keys.NOTHING
        self.queues: list[Queue] = []
        self.ring_order = 0
        self.max_segments = blkif.MAX_SEGMENTS
        self.bounces = False
        self.persistent = False
        self._want_queues = queues
        self._want_order = ring_order
        self._abi, self._protocol = keys.ABIS[abi]
        self._want_persistent = persistent
        self._want_indirect = blkif.MAX_INDIRECT_SEGMENTS if indirect is True else int(indirect)
        self._trusted = trusted
        self._held: list[NDArray[Any]] = []  # by queue: what is to be requeued

    # What the disk itself does

    def _completed(self, done: Done) -> None:
        raise NotImplementedError

    def _fail_all(self) -> None:
        raise NotImplementedError

    def _outstanding(self) -> bool:
        raise NotImplementedError

    def _resized(self) -> None:
        raise NotImplementedError

    def _recut(self, ios: NDArray[Any]) -> NDArray[Any]:
        raise NotImplementedError

    # What `front` asks of a class

    def _publish(self, new: XenbusState) -> None:
        """New rings, and where they are: everything that the backend needs to connect."""
        self._suspend(0)
        self._release(0)
        offer = keys.read_offer(self._read_key)
        cpus = len(os.sched_getaffinity(0))
        count = min(offer.queues, cpus if self._want_queues is None else self._want_queues)
        self.ring_order = min(offer.ring_order, 4 if self._want_order is None else self._want_order)
        while len(self.queues) < count:
            self.queues.append(Queue(self.platform, len(self.queues), self.devid, self._completed, self.violated))
        self._retire(count)
        rings = [queue.open(self._backend_id, self.ring_order, self._abi) for queue in self.queues]
        wanted = keys.frontend_keys(rings, self.ring_order, self._protocol, self._want_persistent)
        store = self.platform.store

        def write(tx: int) -> None:
            for key in filter(keys.is_negotiated, store.ls(self.path, tx) or []):
                store.rm(f"{self.path}/{key}", tx)
            for key, value in wanted.items():
                store.write(f"{self.path}/{key}", value, tx)
            store.write(f"{self.path}/state", int(new), tx)

        self._commit(write, new)

    def _retire(self, count: int) -> None:
        """Fewer queues than before: what the others held goes to those that stay."""
        ended = self.queues[count:]
        del self.queues[count:]
        for queue in ended:
            queue.end()
            self.queues[0].requeue(queue.take_backlog())

    def _use(self, new: XenbusState) -> None:
        """The backend is connected: learn what the disk is, and begin."""
        self.info = keys.read_info(self._read_key)
        pages = self.platform.pages
        untrusted = not self._trusted or self.platform.store.read(f"{self.path}/trusted") == b"0"
        self.persistent = self._want_persistent and self.info.persistent
        # Where pages cannot be granted on the way, they are granted once, whether or not the backend keeps them mapped.
        granted = self.persistent or not pages.dynamic
        self.bounces = granted or untrusted
        most = min(self._want_indirect, self.info.indirect)
        self.max_segments = most if most > blkif.MAX_SEGMENTS else blkif.MAX_SEGMENTS
        if most_bytes(self.max_segments, self.info.sector_size, 4096 - 512) <= 0:
            raise ValueError("sector size is larger than a request")
        self._count_connection()
        self._say(new)  # and not once more behind the queues' beginning: by then the ring may have failed
        held, self._held = self._held, []
        for i, ios in enumerate(held):
            self.queues[i % len(self.queues)].requeue(ios)
        for queue in self.queues:
            waiting = queue.take_backlog()
            if len(waiting):
                queue.submit(self._recut(waiting))
            queue.activate(granted=granted, bounce=self.bounces, untrusted=untrusted, max_segments=self.max_segments)

    def _refresh(self) -> None:
        sectors = keys.read_sectors(self._read_key)
        if sectors != self.info.sectors:
            self.info = keys.resized(self.info, sectors)
            self._resized()
            self._entered(self.state)

    def _suspend(self, patience: float) -> None:
        """Leave the ring, and remember what is in flight. A backend that closes in order may finish it first."""
        for queue in self.queues:
            queue.paused = True
        deadline = time.monotonic() + patience
        while self._in_flight() and time.monotonic() < deadline:
            time.sleep(POLL)
        held = [queue.deactivate() for queue in self.queues]
        self._held = [
            np.concatenate([before, now]) for before, now in zip(self._held or [np.zeros(0, IO)] * len(held), held)
        ]

    def _give_back(self) -> None:
        for queue in self.queues:
            queue.release()

    def _stop(self, why: str) -> None:
        for queue in self.queues:
            queue.deactivate()
            queue.take_backlog()
        self._fail_all()

    def _end(self) -> None:
        for queue in self.queues:
            queue.end()

    def _in_flight(self) -> int:
        return sum(queue.in_flight for queue in self.queues if not queue.borrowed)

    def _busy(self) -> bool:
        return self.state is XenbusState.Connected and self._outstanding()
