"""The life of a disk on the guest's side: what is said to the backend through xenstore, and when.

The table of pvdrivers.xenbus decides; here its actions are carried out, on one control thread a disk. A watch callback
only sets a flag: whatever a backend writes, and however often, costs one look at a time.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.errors import ConfigError, ProtocolViolation, PvError
from pvdrivers.platform import Platform
from pvdrivers.xenbus import Action, BadState, Role, XenbusState, parse_state, step
from rings import blkif
from rings.vdev import vdev_name

from . import blkfront_keys as keys
from .blkfront_io import most_bytes
from .blkfront_queue import Done, Queue
from .blkfront_records import IO
from .watches import Watches

__all__ = ["Life"]

_DRAIN = 5.0  # seconds that requests in flight have to end when the backend closes, or we do
_GIVE_BACK = 2.0  # seconds that the backend has to close, and so to unmap, after us
_POLL = 0.02


class Life:
    """Everything of a disk but its requests."""

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
        self.platform = platform
        self.devid = devid
        self.name = vdev_name(devid)
        self.path = f"/local/domain/{platform.domid}/device/vbd/{devid}"
        self.state = XenbusState.Unknown
        self.failure = ""  # why the disk is out of use
        self.info: keys.DiskInfo = keys.NOTHING
        self.queues: list[Queue] = []
        self.ring_order = 0
        self.max_segments = blkif.MAX_SEGMENTS
        self.bounces = False
        self.persistent = False
        self.connected_at = time.monotonic()
        self.connections = 0
        self._want_queues = queues
        self._want_order = ring_order
        self._abi, self._protocol = keys.ABIS[abi]
        self._want_persistent = persistent
        self._want_indirect = blkif.MAX_INDIRECT_SEGMENTS if indirect is True else int(indirect)
        self._trusted = trusted
        self._own_watches = watches is None
        self._watches = watches
        self._tokens: list[str] = []
        self._backend = ""
        self._backend_id = 0
        self._wanted = True
        self._held: list[NDArray[Any]] = []  # by queue: what is to be requeued
        self._look = threading.Event()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ended = False

    # What the disk itself does

    @property
    def backend_domid(self) -> int:
        """The domain that serves this disk."""
        return self._backend_id

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

    # For everybody

    def start(self) -> None:
        """Begin to follow the backend, on a thread of the disk's own, without waiting for it; connect() does."""
        if self._thread is not None:
            return
        self._read_backend()
        self._say(XenbusState.Initialising)
        if self._watches is None:
            self._watches = Watches(self.platform.store)
        self._watch()
        self._thread = threading.Thread(target=self._follow, name=f"blkfront-{self.name}", daemon=True)
        self._thread.start()

    def connect(self, timeout: float = 30.0) -> None:
        """Wait until the disk can be used. PvError when it cannot within `timeout` seconds, with the reason."""
        self.start()
        if not self.wait_state(lambda: self.state is XenbusState.Connected or bool(self.failure), timeout):
            theirs = self._their_state()
            raise PvError(
                f"disk {self.name} ({self.path}): no connection within {timeout:g} s; we are {self.state.name}, the"
                f" backend {self._backend} is {getattr(theirs, 'name', theirs)}. Is a backend running for it?"
            )
        if self.failure:
            raise PvError(self.failure)

    def wait_state(self, reached: Any, timeout: float) -> bool:
        """Wait until reached() is true, looking whenever the state changes. False after `timeout` seconds."""
        with self._change:
            return bool(self._change.wait_for(reached, timeout))

    def close(self, timeout: float = _DRAIN) -> None:
        """Orderly: requests in flight end first, then state Closed, then rings and grants are taken back.

        What has not ended after `timeout` seconds gets OSError(EIO). Harmless a second time.
        """
        if self._ended:
            return
        self._wanted = False
        thread = self._thread
        if thread is not None:
            deadline = time.monotonic() + timeout
            while self._busy() and time.monotonic() < deadline and not self.failure:
                time.sleep(_POLL)
            self._ended = True
            self._look.set()
            thread.join()
            try:
                self._drop(self.failure or f"disk {self.name} is closed")
                if self.state is not XenbusState.Unknown:
                    self._say(XenbusState.Closing)
                    self._say(XenbusState.Closed)
            except OSError:
                pass  # the store is gone, and nobody to say it to
            self._release(_GIVE_BACK)
            for queue in self.queues:
                queue.end()
        self._ended = True
        if self._watches is not None:
            for token in self._tokens:
                self._watches.remove(token)
            if self._own_watches:
                self._watches.close()

    # Following the backend: the control thread

    def _follow(self) -> None:
        while True:
            self._look.wait()
            self._look.clear()
            if self._ended:
                return
            try:
                while not self._ended and not self.failure and self._step():
                    pass
            except PvError as error:
                self._fail(str(error))
            except ValueError as error:
                self._fail(str(ProtocolViolation(self._backend_id, f"vbd {self.name}", f"backend's {error}")))
            except OSError as error:
                self._fail(f"disk {self.name}: {error}")

    def _step(self) -> bool:
        """One look at the backend, and what follows from it. True if the state has changed: look again."""
        theirs = self._their_state()
        if self.platform.store.read(f"{self.path}/backend-id") is None:
            self._fail(f"disk {self.name} has been detached")
            return False
        if isinstance(theirs, BadState):
            raise ProtocolViolation(self._backend_id, f"vbd {self.name}", f"backend state is {theirs.text}")
        if theirs is XenbusState.Unknown:
            self._read_backend()
        new, action = step(Role.FRONT, self.state, theirs, self._wanted)
        if self.state is XenbusState.Closed and new is XenbusState.Initialising and self._read_key("online") == b"0":
            return False  # unplugged: nobody will come back
        if action is Action.REJECT:
            raise ProtocolViolation(
                self._backend_id, f"vbd {self.name}", f"backend went to {theirs.name} while we are {self.state.name}"
            )
        if action in (Action.ADVERTISE, Action.RECONNECT):
            self._publish(new)
        elif action is Action.CONNECT:
            self._use(new)
        elif action is Action.REFRESH:
            self._refresh()
            if new is not self.state:
                self._say(new)
        elif action is Action.CLOSE:
            self._suspend(_DRAIN if theirs is XenbusState.Closing else 0)
            self._say(new)
            self._release(_GIVE_BACK)
            return True
        elif action in (Action.SAY, Action.RECONFIGURE):
            self._say(new)
            return True
        return False

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

        store.transaction(write)
        self._entered(new)

    def _retire(self, count: int) -> None:
        """Fewer queues than before: what the others held goes to those that stay."""
        for queue in self.queues[count:]:
            self.queues[0].requeue(queue.take_backlog())
            queue.end()
        del self.queues[count:]

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
        self._say(new)
        held, self._held = self._held, []
        for i, ios in enumerate(held):
            self.queues[i % len(self.queues)].requeue(ios)
        for queue in self.queues:
            waiting = queue.take_backlog()
            if len(waiting):
                queue.submit(self._recut(waiting))
            queue.activate(granted=granted, bounce=self.bounces, untrusted=untrusted, max_segments=self.max_segments)
        if not self.connections:
            self.connected_at = time.monotonic()
        self.connections += 1
        self._entered(new)

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
            time.sleep(_POLL)
        held = [queue.deactivate() for queue in self.queues]
        self._held = [
            np.concatenate([before, now]) for before, now in zip(self._held or [np.zeros(0, IO)] * len(held), held)
        ]

    def _release(self, patience: float) -> None:
        """Take rings and grants back, once the backend has let go of them or `patience` seconds are over."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self._their_state() in (
            XenbusState.Connected,
            XenbusState.Closing,
        ):
            time.sleep(_POLL)
        for queue in self.queues:
            queue.release()

    def _in_flight(self) -> int:
        return sum(queue.in_flight for queue in self.queues if not queue.borrowed)

    def _busy(self) -> bool:
        return self.state is XenbusState.Connected and self._outstanding()

    # When it goes wrong

    def violated(self, violation: str) -> None:
        """A queue's ring is dead; on its pump's thread."""
        self._fail(str(ProtocolViolation(self._backend_id, f"vbd {self.name}", violation)))

    def _fail(self, why: str) -> None:
        """Out of use until it is closed. Every caller gets EIO; the backend is told to go."""
        if self.failure:
            return
        self._drop(why)
        try:
            if self.platform.store.read(f"{self.path}/backend") is not None:
                self._say(XenbusState.Closing)
                self._say(XenbusState.Closed)
        except OSError:
            pass  # the store is gone as well
        with self._change:
            self._change.notify_all()

    def _drop(self, why: str) -> None:
        self.failure = why
        for queue in self.queues:
            queue.deactivate()
            queue.take_backlog()
        self._fail_all()

    # Xenstore

    def _watch(self) -> None:
        assert self._watches is not None
        for token in self._tokens:
            self._watches.remove(token)
        paths = (f"{self._backend}/state", f"{self.path}/backend")
        self._tokens = [self._watches.add(path, self._look.set) for path in paths]

    def _read_backend(self) -> None:
        """Who the backend is; again when it is gone, for another domain may be in its place."""
        store = self.platform.store
        path, domid = store.read(f"{self.path}/backend"), store.read(f"{self.path}/backend-id")
        if path is None or domid is None or not domid.isdigit():
            if self._backend:
                raise ConfigError(f"disk {self.name} has been detached")
            raise ConfigError(f"disk {self.name}: no backend and backend-id in {self.path}; attach it first")
        before, self._backend = self._backend, path.decode()
        self._backend_id = int(domid)
        if before not in ("", self._backend):
            self._watch()

    def _read_key(self, key: str) -> bytes | None:
        try:
            return self.platform.store.read(f"{self._backend}/{key}")
        except OSError as error:
            if error.errno != errno.EACCES:
                raise
            return None

    def _their_state(self) -> XenbusState | BadState:
        try:
            return parse_state(self._read_key("state"))
        except OSError:
            return XenbusState.Unknown

    def _say(self, state: XenbusState) -> None:
        self.platform.store.write(f"{self.path}/state", int(state))
        self._entered(state)

    def _entered(self, state: XenbusState) -> None:
        with self._change:
            self.state = state
            self._change.notify_all()
