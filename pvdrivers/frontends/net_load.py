"""A load for networks: packets from vifs to vifs of this process, by the loop of net_load_kernels.

A Generator has the vifs and the pages that their packets are in; run() is one load on it, measured over the time that
was asked for and drained behind it. Vifs that a generator has are its own: they are not good for anything else then.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.closing import Closing
from pvdrivers.errors import ConfigError, PvError
from pvdrivers.syscalls import EPOLL_EVENT
from rings.jit import compile_for
from rings.netif import GSO_TCPV4

from . import net_load_kernels as kernels
from . import net_load_records as records
from .blkfront_records import HIST_BUCKETS
from .memory import GuestBuffer
from .netfront import Netfront
from .netfront import warm as warm_vif
from .netfront_queue import Queue
from .netfront_records import MOST_BYTES, SLOTS
from .netfront_staging import offered, stage

__all__ = ["LOOKS", "Generator", "NetPlan", "NetResult", "warm"]

LOOKS = {"sample": records.LOOK_SAMPLE, "headers": records.LOOK_HEADERS, "all": records.LOOK_ALL}
_SLICE = 0.1  # seconds in the kernel before Python looks in
_DRAIN = 2.0
_ETHERNET, _IPV4, _TCP, _UDP = 14, 20, 20, 8
_UDP_HEAD, _TCP_HEAD = 48, 56  # of the headers and what follows, up to a multiple of 8
_PAGE = 4096


@dataclass(frozen=True)
class NetPlan:
    """What a load does. `paths`: (index of the vif that sends, of the one that receives); -1 for one elsewhere.

    `to` is the address that packets to elsewhere are sent to. `on_way` bounds the slots that are under way on a path;
    0: the sender takes no notice of the receiver, as a sender in another process has to.
    """

    paths: Sequence[tuple[int, int]]
    size: int = 64  # bytes, Ethernet header and all, check sequence not counted
    gso_size: int = 0  # bytes a segment, 0: packets are what they are
    streams: int = 1  # UDP or TCP flows of each sending queue
    on_way: int = SLOTS
    look: str = "sample"
    spin: int = 0  # looks at the rings before sleeping
    seconds: float = 1.0
    to: str = "02:00:00:00:00:01"


@dataclass(frozen=True)
class NetResult:
    """What has been done while it was measured."""

    seconds: float
    sent: int  # packets that were put on a ring
    received: int
    received_bytes: int
    path_bytes: tuple[int, ...]  # ... by each path, in their order
    answered: int  # slots
    lost: int  # slots
    errors: int  # slots with an error, either way
    wrong: int  # packets whose bytes were not what was sent
    hist: NDArray[np.uint64] = field(repr=False)  # ns from a packet's stamp to when it was seen


def _ones(data: bytes) -> int:
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def template(src: bytes, dst: bytes, size: int, gso_size: int) -> bytes:
    """The headers of a packet of `size` bytes: Ethernet, IPv4 (10.0.0.0/8, by the last bytes of the addresses), and TCP
    for segments, UDP without a checksum for others. Raises ConfigError for a size that has no room for them."""
    tcp = gso_size > 0
    least = _ETHERNET + _IPV4 + (_TCP if tcp else _UDP)
    if not least <= size <= MOST_BYTES:
        raise ConfigError(f"packets of {size} bytes: from {least} to {MOST_BYTES} have a header and fit a ring")
    addresses = b"\x0a" + src[-3:] + b"\x0a" + dst[-3:]
    ip = b"\x45\0" + (size - _ETHERNET).to_bytes(2, "big") + b"\0\0\x40\0\x40" + (b"\x06" if tcp else b"\x11")
    ip = ip + _ones(ip + b"\0\0" + addresses).to_bytes(2, "big") + addresses
    if tcp:
        rest = bytes(2) + b"\x1f\x90" + bytes(8) + b"\x50\x18\xff\xff" + bytes(4)
    else:
        rest = bytes(2) + b"\x1f\x90" + (size - _ETHERNET - _IPV4).to_bytes(2, "big") + bytes(2)
    head = _TCP_HEAD if tcp else _UDP_HEAD
    return (dst + src + b"\x08\0" + ip + rest)[: min(head, size)].ljust(min(head, size), b"\0")


class _Lane:
    """A queue of a vif, with pages of its own to send from and to receive into."""

    def __init__(self, vif: Netfront, queue: Queue, pages: int) -> None:
        self.queue = queue
        self.sender, self.receiver = np.zeros(1, records.SENDER), np.zeros(1, records.RECEIVER)
        self.send_from = GuestBuffer(vif.platform.pages, pages * _PAGE)
        self.receive_into = GuestBuffer(vif.platform.pages, pages * _PAGE)
        for buffer, record in ((self.send_from, self.sender), (self.receive_into, self.receiver)):
            buffer.register(vif.backend_domid)
            row = record[0]
            row["queue"], row["n_pages"] = queue.at, pages
            row["pages"], row["grefs"] = buffer.address, buffer.frames_at(0)
        self.fill()
        # All slots have been given out, with netfront's own pages: these are used up first.
        first = int(queue.record[0]["rx_pages"])
        self.at = first + np.arange(SLOTS, dtype=np.int64) * _PAGE
        self.receiver[0]["at"] = self.at.ctypes.data

    def fill(self) -> None:
        """What stands in the pages that are sent, as far as no headers are written over it."""
        row = self.sender[0]
        kernels.fill(int(row["pages"]), int(row["n_pages"]))
        row["next"] = 0

    def stage(self, vif: Netfront) -> int:
        """Have the pages kept mapped by the backend, if it offers that for all of them: how many are."""
        sent, received = (list(map(int, -buffer.frames)) for buffer in (self.send_from, self.receive_into))
        if vif.control is None or len(sent) + len(received) > offered(vif.control, self.queue.index):
            return 0
        return stage(vif.control, self.queue.index, sent, received, _DRAIN)

    def free(self) -> None:
        self.send_from.free()
        self.receive_into.free()


class Generator(Closing):
    """Vifs to send from and to receive by; a context manager that closes them."""

    def __init__(
        self, vifs: Sequence[Netfront], *, working_set: int = 2 << 20, queue: int | None = None, staging: bool = False
    ) -> None:
        """The vifs are connected. `working_set`: bytes of all pages together of the queues that a packet goes through,
        the sender's and the receiver's, for each pair; rounded up to a ring's worth of pages at both. With `queue` it
        has that queue of each vif alone, and another generator, in another thread, may have another. With `staging` the
        pages are kept mapped, as netfront has its own (which are not used here: Wishes.staging should be off), if a
        backend offers that for so many; `staged` says how many are.
        """
        warm()
        self.vifs = list(vifs)
        pages = max(SLOTS, working_set // 2 // _PAGE)
        self.working_set = 2 * pages * _PAGE
        chosen = slice(None) if queue is None else slice(queue, queue + 1)
        self._lanes = [[_Lane(vif, one, pages) for one in vif.queues[chosen]] for vif in self.vifs]
        self._all = [lane for lanes in self._lanes for lane in lanes]
        self.staged = 0
        if staging:
            self.staged = sum(lane.stage(vif) for vif, lanes in zip(self.vifs, self._lanes) for lane in lanes)
        self._load = np.zeros(1, records.LOAD)
        self._hist = np.zeros(HIST_BUCKETS, np.uint64)
        self._epoll = select.epoll()
        for lane in self._all:
            self._epoll.register(int(lane.queue.record[0]["epoll"]), select.EPOLLIN)
        self._events = np.zeros(4, EPOLL_EVENT)
        row = self._load[0]
        row["epoll"], row["epoll_events"] = self._epoll.fileno(), self._events.ctypes.data
        row["hist"] = self._hist.ctypes.data
        self._keep: list[Any] = []

    def close(self) -> None:
        """Close the vifs, and take the pages back. PlatformError if a backend has not let go of one."""
        for vif in self.vifs:
            vif.close()
        for lane in self._all:
            lane.free()
        self._epoll.close()

    def run(self, plan: NetPlan) -> NetResult:
        """One load. Raises PvError if a backend breaks the protocol, or goes while it runs."""
        senders, receivers, flows = self._arrange(plan)
        row = self._load[0]
        row["drain"], row["spin"] = 0, plan.spin
        row["senders"], row["n_senders"] = senders.ctypes.data, len(senders)
        row["receivers"], row["n_receivers"] = receivers.ctypes.data, len(receivers)
        row["flows"], row["n_flows"] = flows.ctypes.data, len(flows)
        self._hist[:] = 0
        began = time.monotonic_ns()
        row["busy_at"] = began
        self._until(began + int(plan.seconds * 1e9))
        result = self._told(senders, receivers, flows, (time.monotonic_ns() - began) / 1e9)
        row["drain"] = 1
        self._until(time.monotonic_ns() + int(_DRAIN * 1e9))
        self._put_back(plan, senders, receivers)
        return result

    def _arrange(self, plan: NetPlan) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The records of a load: those of the lanes, side by side."""
        if plan.look not in LOOKS:
            raise ConfigError(f"look {plan.look!r} is not one of {', '.join(LOOKS)}")
        sending = [lane for source, _ in plan.paths if source >= 0 for lane in self._lanes[source]]
        receiving = [lane for _, target in plan.paths if target >= 0 for lane in self._lanes[target]]
        if len(set(map(id, sending))) != len(sending) or len(set(map(id, receiving))) != len(receiving):
            raise ConfigError("a vif sends by one path, and receives by one")
        flows = np.zeros(len(plan.paths), records.FLOW)
        senders, receivers = np.zeros(len(sending), records.SENDER), np.zeros(len(receiving), records.RECEIVER)
        self._keep, i, j = [], 0, 0
        for k, (source, target) in enumerate(plan.paths):
            flow = flows.ctypes.data + k * records.FLOW.itemsize
            flows[k]["limit"] = plan.on_way if target >= 0 and source >= 0 else 0
            dst = bytes.fromhex(plan.to.replace(":", "")) if target < 0 else self.vifs[target].mac
            head = min(plan.size, _TCP_HEAD if plan.gso_size else _UDP_HEAD)
            for lane in self._lanes[source] if source >= 0 else ():
                if plan.look == "all":
                    lane.fill()
                text = np.frombuffer(template(self.vifs[source].mac, dst, plan.size, plan.gso_size), np.uint8)
                self._keep.append(text)
                senders[i] = lane.sender[0]
                row = senders[i]
                row["flow"], row["size"], row["streams"] = flow, plan.size, plan.streams
                row["gso_size"], row["gso_type"] = plan.gso_size, GSO_TCPV4 if plan.gso_size else 0
                row["template"], row["head"] = text.ctypes.data, head
                row["answered"] = row["errors"] = 0
                i += 1
            for lane in self._lanes[target] if target >= 0 else ():
                receivers[j] = lane.receiver[0]
                row = receivers[j]
                row["flow"], row["look"], row["head"] = flow, LOOKS[plan.look], head
                row["errors"] = row["wrong"] = 0
                j += 1
        return senders, receivers, flows

    def _until(self, end: int) -> None:
        """Work until then, or all is drained; the rings' control thread gets in between."""
        at = int(self._load.ctypes.data)
        while (now := time.monotonic_ns()) < end:
            with contextlib.ExitStack() as stack:
                for lane in self._all:
                    stack.enter_context(lane.queue.tx_lock)
                    stack.enter_context(lane.queue.rx_lock)
                if not all(lane.queue.active for lane in self._all):
                    raise PvError(next((vif.failure for vif in self.vifs if vif.failure), "the backend has gone"))
                said = kernels.run(at, min(end, now + int(_SLICE * 1e9)))
            if said == kernels.VIOLATED:
                raise PvError(next((vif.failure for vif in self.vifs if vif.failure), "a ring is in no order"))
            if said == kernels.DRAINED:
                return

    def _put_back(self, plan: NetPlan, senders: NDArray[Any], receivers: NDArray[Any]) -> None:
        """Where each lane stands, for the next load."""
        sending = [lane for source, _ in plan.paths if source >= 0 for lane in self._lanes[source]]
        receiving = [lane for _, target in plan.paths if target >= 0 for lane in self._lanes[target]]
        for lane, row in zip(sending, senders):
            lane.sender[0] = row
        for lane, row in zip(receiving, receivers):
            lane.receiver[0] = row

    def _told(self, senders: NDArray[Any], receivers: NDArray[Any], flows: NDArray[Any], seconds: float) -> NetResult:
        total = {name: int(flows[name].sum()) for name in ("sent", "received", "received_bytes", "lost")}
        return NetResult(
            seconds, **total, path_bytes=tuple(map(int, flows["received_bytes"])),
            answered=int(senders["answered"].sum()),
            errors=int(senders["errors"].sum()) + int(receivers["errors"].sum()), wrong=int(receivers["wrong"].sum()),
            hist=self._hist.copy(),
        )  # fmt: skip


def warm() -> None:
    """Compile all that a load needs. Twice costs nothing."""
    warm_vif()
    for name, arguments in kernels.ARGUMENTS.items():
        compile_for(getattr(kernels, name), arguments)
