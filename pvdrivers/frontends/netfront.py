"""A network interface of a guest: netfront, from its directory in xenstore to an orderly close, with a public API.

    vif = Netfront(platform, 0)
    vif.connect(timeout=10)
    vif.send(frame)                  # an Ethernet frame without its check sequence
    frame = vif.receive(timeout=1)
    vif.close()

All methods may be called from several threads. When a backend goes and another comes, new rings are built, and what was
on the old ones is lost, as packets are. A backend that breaks the protocol puts the interface in error: OSError(EIO),
until it is closed. A backend that is killed and started again is not noticed at all.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pvdrivers.errors import ConfigError
from pvdrivers.platform import Platform
from pvdrivers.xenbus import XenbusState
from rings.jit import compile_for
from rings.netif import HASH_ALL, KEY_REQUEST_XDP_HEADROOM
from rings.vnet import CSUM_BLANK, CSUM_NONE, CSUM_VALID

from . import netfront_groups_kernels
from . import netfront_kernels as kernels
from . import netfront_keys as keys
from .front import Frontend
from .netfront_control import ControlRing
from .netfront_control import warm as warm_control
from .netfront_groups import Groups
from .netfront_hash import Hash, apply
from .netfront_queue import BATCH, Queue
from .netfront_records import MOST_BYTES, RX, TX
from .netfront_staging import stage
from .watches import Watches

__all__ = ["CSUM_BLANK", "CSUM_NONE", "CSUM_VALID", "Frame", "Netfront", "warm"]

log = logging.getLogger(__name__)

MOST_HEADROOM = 2048
_SLICE_MS = 50  # two threads may wait on a queue, and the one that is woken take what the other waits for


@dataclass(frozen=True)
class Frame:
    """A packet with what the ring says of it; `gso_size` bytes a segment, 0 for one that is no larger than the MTU.

    `hash_type` is one of netif.HASH_* if a hash of its flow is known, 0 if not.
    """

    data: bytes
    csum: int = CSUM_NONE
    gso_size: int = 0
    gso_type: int = 0
    hash_type: int = 0
    hash: int = 0


def _frame(q: Queue, i: int) -> Frame:
    """The i-th of those that were received last."""
    size, *said = map(int, q.frames[1, i])
    return Frame(q.buffers[1, i, :size].tobytes(), *said)


class Netfront(Frontend):
    """A vif seen from the guest. See the module's text; connect() first."""

    kind = "vif"
    noun = "vif"

    def __init__(
        self,
        platform: Platform,
        devid: int,
        *,
        queues: int | None = 1,
        wishes: keys.Wishes | None = None,
        trusted: bool = True,
        watches: Watches | None = None,
    ) -> None:
        """`queues` is bounded by what the backend offers; None: one a CPU. `wishes` say what is taken from a backend.

        `trusted=False`, or the key `trusted` = 0: pages that are granted hold nothing but packets.
        """
        if queues is not None and queues < 1:
            raise ConfigError(f"{queues} queues: there is at least one")
        super().__init__(platform, devid, str(devid), watches)
        self.mac = b""
        self.mtu = 1500
        self.carrier = True
        """Whether the backend passes packets: netif.h, "Carrier State". Others hear of a change by `on_carrier`."""
        self.on_carrier: list[Callable[[bool], None]] = []
        self.offer = keys.Offer()
        self.groups = Groups(self)
        self.queues: list[Queue] = []
        self.wishes = wishes or keys.Wishes()
        self._want_queues = queues
        self._trusted = trusted
        self.control: ControlRing | None = None
        """For requests that no method here makes; None if the backend has none."""
        self._headroom = 0
        self._seen = threading.Event()  # the backend has seen that we are Reconfiguring
        self.staged = 0
        """Pages that the backend keeps mapped (staging grants)."""
        self._hash: Hash | None = None

    @property
    def most_queues(self) -> int:
        """It has no more, whatever a backend offers; each connection may have another number."""
        return len(os.sched_getaffinity(0)) if self._want_queues is None else self._want_queues

    # Packets

    def send(self, frame: Any, *, csum: int = CSUM_NONE, gso_size: int = 0, gso_type: int = 0,
             timeout: float | None = None, queue: int = 0) -> None:  # fmt: skip
        """Send one frame of 14 to 65535 bytes, by one of the queues. Waits for room; TimeoutError after `timeout` s.

        OSError(EIO) if the interface has failed, OSError(EMSGSIZE) if the backend takes nothing so large.
        """
        self.send_all([Frame(bytes(frame), csum, gso_size, gso_type)], timeout=timeout, queue=queue)

    def send_all(self, frames: Sequence[Frame], *, timeout: float | None = None, queue: int = 0) -> None:
        """Send frames in order; see send()."""
        deadline = None if timeout is None else time.monotonic() + timeout
        done = 0
        while done < len(frames):
            q = self._queue(queue)
            with q.tx_lock:
                batch = frames[done : done + BATCH]
                for i, frame in enumerate(batch):
                    if len(frame.data) > (MOST_BYTES if q.record[0]["sg"] else 4096):
                        raise OSError(errno.EMSGSIZE, f"vif {self.name}: a frame of {len(frame.data)} bytes")
                    q.buffers[0, i, : len(frame.data)] = np.frombuffer(frame.data, np.uint8)
                    q.frames[0, i] = (
                        len(frame.data), frame.csum, frame.gso_size, frame.gso_type, frame.hash_type, frame.hash,
                    )  # fmt: skip
                sent = -1 if not q.active else self._do(q, kernels.send_all, 0, len(batch))
                if 0 <= sent < len(batch) and kernels.arm(q.at, TX) > 0:
                    continue
            if sent < 0:
                self._failed(q, deadline)
                continue
            done += sent
            if done < len(frames) and sent < len(batch):
                self._sleep(q, deadline, f"vif {self.name}: no room on its ring")

    def _do(self, q: Queue, kernel: Any, which: int, count: int) -> int:
        return int(kernel(q.at, q.buffers[which].ctypes.data, q.frames[which].ctypes.data, count))

    def receive(self, timeout: float | None = None, *, queue: int = 0) -> bytes:
        """The next frame of a queue. TimeoutError if none comes within `timeout` seconds."""
        return self.receive_all(1, timeout, queue=queue)[0].data

    def receive_all(self, most: int = BATCH, timeout: float | None = None, *, queue: int = 0) -> list[Frame]:
        """At least one frame and at most `most`, in order. TimeoutError if none comes within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            q = self._queue(queue)
            with q.rx_lock:
                got = -1 if not q.active else self._do(q, kernels.receive_all, 1, min(most, BATCH))
                if got > 0:
                    return [_frame(q, i) for i in range(got)]
                if got == 0 and kernels.arm(q.at, RX) > 0:
                    continue
            if got < 0:
                self._failed(q, deadline)
                continue
            self._sleep(q, deadline, f"vif {self.name}: no packet came")

    def _queue(self, index: int) -> Queue:
        queues = list(self.queues)  # they may become fewer at any time
        if self.failure or not queues:
            raise OSError(errno.EIO, self.failure or f"vif {self.name}: not connected")
        return queues[index % len(queues)]

    def _failed(self, q: Queue, deadline: float | None) -> None:
        """A kernel would not go on: a violation, or the rings are being changed, for which is waited a moment. For ever
        where nobody is there to connect to."""
        if int(q.record[0]["violation"]):
            self.violated(q.violation())
        elif not self.failure:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"vif {self.name}: its backend is not connected")
            time.sleep(0.005)

    def _sleep(self, q: Queue, deadline: float | None, what: str) -> None:
        left = _SLICE_MS
        if deadline is not None:
            left = min(left, int((deadline - time.monotonic()) * 1000) + 1)
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, what)
        q.wait(left)

    # The control ring

    def set_hash(
        self, key: bytes, *, types: int = HASH_ALL, mapping: Sequence[int] = (), timeout: float = 5.0
    ) -> None:
        """Have the backend choose the queue of each packet by its Toeplitz hash, and tell it with the packet.

        `key` of up to 40 bytes, `types` of netif.HASH_*, and in `mapping` a queue for each value modulo its length.
        It holds from the next packet on, and for later connections too. OSError: EIO without a control ring, EINVAL,
        EOVERFLOW or EOPNOTSUPP as the backend has it; then the one before is set again where that can be done.
        """
        ring = self._control_ring()
        wanted = Hash(bytes(key), types, tuple(mapping))
        try:
            apply(ring, wanted, timeout)
        except OSError:
            self._hash_again(ring)
            raise
        self._hash = wanted

    def clear_hash(self, *, timeout: float = 5.0) -> None:
        """Let the backend choose queues as it likes, and tell nothing. OSError as set_hash()."""
        apply(self._control_ring(), None, timeout)
        self._hash = None

    def set_headroom(self, nbytes: int, timeout: float = 5.0) -> None:
        """Have the backend leave so many bytes free before the data in each page, 0 to 2048, as XDP wants them.

        From the next packet on when this returns. A feature of Linux's only: OSError(EOPNOTSUPP) if the backend has it
        not, TimeoutError if it does not answer.
        """
        if not 0 <= nbytes <= MOST_HEADROOM:
            raise ConfigError(f"vif {self.name}: a headroom of {nbytes} bytes: from 0 to {MOST_HEADROOM}")
        if not self.offer.headroom:
            raise OSError(errno.EOPNOTSUPP, f"vif {self.name}: its backend leaves no headroom")
        self._headroom = nbytes
        self._seen.clear()
        self.platform.store.write(f"{self.path}/{KEY_REQUEST_XDP_HEADROOM}", nbytes)
        deadline = time.monotonic() + timeout
        # Connected again is the backend, too: before that it would not see another change.
        self._say(XenbusState.Reconfiguring)
        while not self._seen.wait(0.05) or (theirs := self._their_state()) is not XenbusState.Connected:
            if self._seen.is_set() and theirs is XenbusState.Reconfigured:
                self._look.set()
            elif not self._seen.is_set() and self.state is XenbusState.Connected:
                self._say(XenbusState.Reconfiguring)  # we went back with the backend, which ended the change before
            if time.monotonic() > deadline or self.failure:
                raise TimeoutError(errno.ETIMEDOUT, f"vif {self.name}: no headroom; {self.failure or 'no answer'}")

    def _refresh(self) -> None:
        if self._their_state() is XenbusState.Reconfigured:
            self._seen.set()
        before, self.carrier = self.carrier, keys.read_carrier(self._read_key)
        if self.carrier != before:
            for call in list(self.on_carrier):
                call(self.carrier)

    def _control_ring(self) -> ControlRing:
        if self.failure or self.control is None:
            raise OSError(errno.EIO, self.failure or f"vif {self.name}: its backend has no control ring")
        return self.control

    def _hash_again(self, ring: ControlRing) -> None:
        try:
            if ring.active:
                apply(ring, self._hash, 5.0)
        except OSError as error:  # packets come all the same, by whatever queue
            log.warning("vif %s: its hash is not set: %s", self.name, error)

    def _stage(self, ring: ControlRing) -> None:
        """Before the first packet: what is not kept mapped is copied, and so is all of it if this fails."""
        self.staged = 0
        try:
            for queue in self.queues if self.wishes.staging and ring.active else ():
                self.staged += stage(ring, queue.index, *queue.grefs(), 5.0)
        except OSError as error:
            log.warning("vif %s: not all of its pages stay mapped: %s", self.name, error)

    def _open_control(self) -> tuple[int, int] | None:
        if not (self.offer.control and self.wishes.control):
            if self.control is not None:
                self.control.end()
            self.control = None
            return None
        if self.control is None:
            self.control = ControlRing(self.platform, self.name)
        return self.control.open(self._backend_id)

    # What `front` asks of a class

    def _publish(self, new: XenbusState) -> None:
        self._suspend(0)
        self._release(0)
        store = self.platform.store
        self.mac = keys.read_mac(lambda key: store.read(f"{self.path}/{key}"))
        self.mtu = keys.read_mtu(lambda key: store.read(f"{self.path}/{key}"))
        self.offer = keys.read_offer(self._read_key)
        count = min(self.offer.queues, self.most_queues)
        while len(self.queues) < count:
            self.queues.append(Queue(self.platform, len(self.queues)))
        ended = self.queues[count:]
        del self.queues[count:]
        for queue in ended:
            queue.end()
        rings = [queue.open(self._backend_id, split=self.offer.split and self.wishes.split) for queue in self.queues]
        wishes = replace(self.wishes, gso=self.wishes.gso and self.wishes.sg)
        wanted = keys.frontend_keys(rings, wishes, self._open_control(), self._headroom)

        def write(tx: int) -> None:
            for key in filter(keys.is_negotiated, store.ls(self.path, tx) or []):
                store.rm(f"{self.path}/{key}", tx)
            for key, value in wanted.items():
                store.write(f"{self.path}/{key}", value, tx)
            # Not Initialised: Linux's netback waits for a frontend that says it is connected, as Linux's does.
            store.write(f"{self.path}/state", int(XenbusState.Connected), tx)

        self._commit(write, new)

    def _use(self, new: XenbusState) -> None:
        untrusted = not self._trusted or self.platform.store.read(f"{self.path}/trusted") == b"0"
        for queue in self.queues:
            queue.activate(sg=self.offer.sg, untrusted=untrusted)
        if self.control is not None:
            self.control.activate()
            self._hash_again(self.control)
            self._stage(self.control)
        self._refresh()
        self.groups.join_again()
        self._count_connection()
        self._say(new)  # last: whoever waits for this expects that it receives

    def _rings(self) -> list[Queue | ControlRing]:
        return [*self.queues, *([] if self.control is None else [self.control])]

    def _suspend(self, patience: float) -> None:
        for ring in self._rings():
            ring.deactivate()

    def _give_back(self) -> None:
        for ring in self._rings():
            ring.release()

    def _stop(self, why: str) -> None:
        for ring in self._rings():
            ring.deactivate()

    def _end(self) -> None:
        for ring in self._rings():
            ring.end()

    # What went on

    def stats(self) -> dict[str, Any]:
        """Counters since the interface was made, of each queue and in sum."""
        names = ("sent", "received", "bytes_sent", "bytes_received", "tx_errors", "tx_dropped", "rx_errors",
                 "wakeups")  # fmt: skip
        per_queue = [
            {name: int(queue.record[0][name]) for name in names} | {"stuck_grants": queue.stuck}
            for queue in self.queues
        ]
        totals = {name: sum(q[name] for q in per_queue) for name in (*names, "stuck_grants")}
        return {"state": self.state.name, **totals, "staged": self.staged, "queues": per_queue}


def warm() -> None:
    """Compile all that an interface needs. Twice costs nothing."""
    for module in (kernels, netfront_groups_kernels):
        for name, arguments in module.ARGUMENTS.items():
            compile_for(getattr(module, name), arguments)
    warm_control()
