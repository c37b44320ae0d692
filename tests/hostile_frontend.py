"""A frontend that lies: raw access to keys, ring pages, slots, indices, grants and events of one guest's disk.

It knows enough of the protocol to connect, and from there on puts what it is told to. Everything goes by the Python
seam of the embedded Xen, so nothing in the frontend under test stands in the way.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pvdrivers.errors import PlatformError
from pvdrivers.platform import PAGE_SIZE, open_platform
from pvdrivers.sim import toolstack
from rings.blkif import ENTRY_SIZE
from rings.ring import ring_entries

INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = 1, 2, 3, 4, 5, 6
READ, WRITE, BARRIER, FLUSH, RESERVED, DISCARD, INDIRECT = range(7)
PROTOCOL = {64: "x86_64-abi", 32: "x86_32-abi"}
HEAD = {64: struct.Struct("<BBHxxxxQQ"), 32: struct.Struct("<BBHQQ")}
INDIRECT_TAIL = struct.Struct("<H2x8I")
RESPONSE = struct.Struct("<QBxh")

Segment = tuple[int, int, int]
"""gref, first sector, last sector."""


def until(condition: Callable[[], Any], timeout: float = 20.0, what: str = "") -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"timed out {what}"
        time.sleep(0.003)


def pack_segments(segments: Sequence[Segment]) -> bytes:
    return b"".join(struct.pack("<IBBxx", *segment) for segment in segments)


def request(op: int, segments: Sequence[Segment] = (), *, id: int = 0, sector: int = 0, nr: int | None = None,
            abi: int = 64) -> bytes:  # fmt: skip
    """A request of one slot; `nr` says another number of segments than there are."""
    body = HEAD[abi].pack(op, len(segments) if nr is None else nr, 0, id, sector) + pack_segments(segments)
    return body.ljust(ENTRY_SIZE[abi], b"\0")


def indirect(op: int, grefs: Sequence[int], nr: int, *, id: int = 0, sector: int = 0, abi: int = 64) -> bytes:
    """An indirect request over pages of segments."""
    head = HEAD[abi].pack(INDIRECT, op, nr, id, sector)
    return (head + INDIRECT_TAIL.pack(0, *[*grefs, *[0] * 8][:8])).ljust(ENTRY_SIZE[abi], b"\0")


def discard(sector: int, sectors: int, *, flag: int = 0, id: int = 0, abi: int = 64) -> bytes:
    """A discard."""
    return (HEAD[abi].pack(DISCARD, flag, 0, id, sector) + struct.pack("<Q", sectors)).ljust(ENTRY_SIZE[abi], b"\0")


@dataclass
class Ring:
    """One queue's shared pages and event channel."""

    pages: Any
    grefs: list[int]
    port: int
    abi: int
    bytes: np.ndarray
    words: np.ndarray  # req_prod, req_event, rsp_prod, rsp_event
    prod: int = 0
    cons: int = 0
    nr_ents: int = field(init=False)

    def __post_init__(self) -> None:
        self.nr_ents = ring_entries(len(self.bytes), ENTRY_SIZE[self.abi])

    def slot(self, index: int) -> np.ndarray:
        """The bytes of a slot."""
        size = ENTRY_SIZE[self.abi]
        at = 64 + (index & (self.nr_ents - 1)) * size
        return self.bytes[at : at + size]


def view(address: int, size: int) -> np.ndarray:
    """Guest memory as bytes."""
    import ctypes

    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


class Frontend:
    """A guest with one disk, at the lowest level. `platform` is its view of the embedded Xen."""

    def __init__(self, run_dir: Any, dom0: Any, params: str, *, mode: str = "w", devid: int = 51712,
                 memory_mib: int = 16, be: dict[str, Any] | None = None, kind: str = "vbd",
                 migrates_from: int | None = None) -> None:  # fmt: skip
        self.dom0, self.devid = dom0, devid
        self.domain = toolstack.create_domain(dom0, name="liar", memory_mib=memory_mib)
        self.domid = self.domain.domid
        if migrates_from is not None:  # the same guest, for the toolstack
            dom0.store.write(f"/local/domain/{self.domid}/vm", dom0.store.read(f"/local/domain/{migrates_from}/vm"))
        self.back = toolstack.attach_vbd(dom0.store, self.domid, devid, params, mode=mode, be=be, kind=kind)
        self.front = f"/local/domain/{self.domid}/device/vbd/{devid}"
        self.error_path = f"/local/domain/0/error/backend/{kind}/{self.domid}/{devid}/error"
        self.platform: Any = open_platform("sim", run_dir=run_dir, domid=self.domid, token=self.domain.token)
        self.store = self.platform.store
        self.events = self.platform.open_events()
        self.rings: list[Ring] = []
        self.grefs: list[int] = []
        self.pages: list[Any] = []
        self.gone = False

    # The store

    def backend(self) -> int:
        """The backend's state, 0 if there is none."""
        return int(self.dom0.store.read(f"{self.back}/state") or 0)

    def key(self, name: str) -> str | None:
        """A key of the backend's directory."""
        raw = self.dom0.store.read(f"{self.back}/{name}")
        return None if raw is None else raw.decode()

    def error(self) -> str:
        """What Linux's place for errors says."""
        return (self.dom0.store.read(self.error_path) or b"").decode()

    def write(self, **keys: Any) -> None:
        """Keys of the frontend's directory: _ for -, and __ for /."""
        for name, value in keys.items():
            self.store.write(f"{self.front}/{name.replace('__', '/').replace('_', '-')}", value)

    def say(self, state: Any, **keys: Any) -> None:
        """Keys, then the state."""
        self.write(**keys)
        self.store.write(f"{self.front}/state", state)

    def wait(self, *states: int, timeout: float = 20.0) -> int:
        """Wait for one of the backend's states."""
        until(lambda: self.backend() in states, timeout, f"for {states}, is {self.backend()}: {self.error()}")
        return self.backend()

    # Memory, grants, events

    def alloc(self, count: int = 1) -> tuple[np.ndarray, list[int]]:
        """Pages: their bytes and their frames."""
        pages = self.platform.pages.alloc(count)
        self.pages.append(pages)
        return view(pages.address, count * PAGE_SIZE), list(pages.frames)

    def grant(self, frame: int, domid: int = 0, *, readonly: bool = False) -> int:
        """A gref for a page."""
        gref = self.platform.pages.grant(frame, domid, readonly=readonly)
        self.grefs.append(gref)
        return gref

    def page(self, count: int = 1, **how: Any) -> tuple[np.ndarray, list[int]]:
        """Pages and their grefs."""
        data, frames = self.alloc(count)
        return data, [self.grant(frame, **how) for frame in frames]

    def new_ring(self, order: int = 0, abi: int = 64, *, start: int = 0, readonly: bool = False) -> Ring:
        """A formatted ring whose indices begin at `start`."""
        pages = self.platform.pages.alloc(1 << order)
        self.pages.append(pages)
        data = view(pages.address, PAGE_SIZE << order)
        grefs = [self.grant(frame, readonly=readonly) for frame in pages.frames]
        words = data[:16].view(np.uint32)
        words[:] = [start, start + 1, start, start + 1]
        ring = Ring(pages, grefs, self.events.alloc_unbound(0), abi, data, words, start, start)
        self.rings.append(ring)
        return ring

    # The handshake

    def connect(self, *, order: int = 0, queues: int = 1, abi: int = 64, start: int = 0, **keys: Any) -> Ring:
        """As an honest frontend; the first ring. `keys` are added, or replace what is said."""
        self.wait(INIT_WAIT)
        said = self.keys_of([self.new_ring(order, abi, start=start) for _ in range(queues)], order) | keys
        self.say(INITIALISED, **said)
        self.wait(CONNECTED)
        self.say(CONNECTED)
        return self.rings[-queues]

    def keys_of(self, rings: list[Ring], order: int = 0) -> dict[str, Any]:
        """What a frontend says of its rings."""
        out: dict[str, Any] = {"protocol": PROTOCOL[rings[0].abi], "feature_persistent": 0}
        if order:
            out["ring_page_order"] = order
        if len(rings) > 1:
            out["multi_queue_num_queues"] = len(rings)
        for q, ring in enumerate(rings):
            at = f"queue_{q}__" if len(rings) > 1 else ""
            names = [f"{at}ring_ref{i}" for i in range(1 << order)] if order else [f"{at}ring_ref"]
            out |= dict(zip(names, ring.grefs)) | {f"{at}event_channel": ring.port}
        return out

    def forget_keys(self) -> None:
        """Take away what was written of rings."""
        for name in self.store.ls(self.front) or ():
            if name.startswith(("ring-", "event-", "multi-", "queue-", "protocol", "feature-")):
                self.store.rm(f"{self.front}/{name}")

    def reconnect(self, **how: Any) -> Ring:
        """After a close: from the beginning, on new rings."""
        self.close()
        self.rings.clear()
        self.forget_keys()
        self.say(INITIALISING)
        return self.connect(**how)

    def close(self) -> None:
        """Closing, Closed, and wait until the backend has followed."""
        self.say(CLOSING)
        self.wait(CLOSING, CLOSED)
        self.say(CLOSED)
        self.wait(CLOSED)

    # Requests

    def put(self, ring: Ring, *slots: bytes, push: bool = True) -> None:
        """Raw slots, then the producer index and an event."""
        for raw in slots:
            ring.slot(ring.prod)[: len(raw)] = np.frombuffer(raw, np.uint8)[: ENTRY_SIZE[ring.abi]]
            ring.prod = (ring.prod + 1) & 0xFFFFFFFF
        if push:
            self.push(ring)

    def push(self, ring: Ring, prod: int | None = None) -> None:
        """Any producer index, and an event."""
        ring.words[0] = np.uint32((ring.prod if prod is None else prod) & 0xFFFFFFFF)
        self.events.notify(ring.port)

    def answers(self, ring: Ring, count: int, timeout: float = 20.0) -> list[tuple[int, int, int]]:
        """`count` responses: (id, operation, status)."""
        until(lambda: (int(ring.words[2]) - ring.cons) & 0xFFFFFFFF >= count, timeout,
              f"for {count} responses, indices {ring.words.tolist()}: {self.error()}")  # fmt: skip
        found = []
        for _ in range(count):
            raw = ring.slot(ring.cons).tobytes()
            if ring.abi == 64:
                found.append(RESPONSE.unpack_from(raw))
            else:
                found.append(struct.unpack_from("<QBxh", raw))
            ring.cons = (ring.cons + 1) & 0xFFFFFFFF
        ring.words[3] = np.uint32((ring.cons + 1) & 0xFFFFFFFF)
        return found

    def ask(self, ring: Ring, *slots: bytes, timeout: float = 20.0) -> list[int]:
        """Put, and the statuses of the answers in the order of their ids."""
        self.put(ring, *slots)
        return [status for _, _, status in sorted(self.answers(ring, len(slots), timeout))]

    # The end

    def all_released(self, timeout: float = 20.0) -> None:
        """Every page that was granted is let go of, so the guest can have it back."""
        left = list(self.grefs)

        def ended() -> bool:
            left[:] = [gref for gref in left if not self.platform.pages.end(gref)]
            return not left

        until(ended, timeout, f"for grants {left}")
        self.grefs.clear()

    def leave(self) -> None:
        """The guest's process ends, as if it had been killed."""
        if not self.gone:
            self.gone = True
            self.events.close()
            self.platform.close()

    def destroy(self) -> None:
        """What xl destroy does."""
        self.leave()
        try:
            toolstack.destroy(self.dom0, self.domid)
        except PlatformError:
            toolstack.clean(self.dom0.store, self.domid, self.domain.uuid)
