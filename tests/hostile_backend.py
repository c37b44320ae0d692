"""A block backend in plain Python over the Python seam: honest as it stands, and hostile by its hooks.

It serves one device from a bytearray. A test changes what it says by replacing `answer` (what is put on the ring for
a request), `keys` (what is published) or by writing to the ring itself.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pvdrivers.errors import PlatformError
from pvdrivers.platform import PAGE_SIZE
from rings import blkif
from rings.ring import RING_END, advance_prod, back_end, final_check, push, ring_entries, slot, take

INIT_WAIT, CONNECTED, CLOSING, CLOSED = 2, 4, 5, 6

Answer = tuple[int, int, int]
"""(id, operation, status) of one response."""


@dataclass
class Request:
    """One request as the guest sent it."""

    queue: int
    id: int
    op: int  # of an indirect request the inner one
    sector: int
    segments: list[tuple[int, int, int]]  # (gref, first, last)
    sectors: int = 0
    flag: int = 0
    indirect: bool = False


@dataclass
class Ring:
    """One queue that is connected."""

    index: int
    mapping: Any
    port: int
    end: Any
    abi: int
    held: list[Any] = field(default_factory=list)

    @property
    def at(self) -> int:
        return int(self.end.ctypes.data)


class Backend:
    """Serves a device of `domid` on a thread of its own, from start() to stop()."""

    def __init__(self, dom0: Any, path: str, domid: int, size: int = 1 << 20, **keys: Any) -> None:
        self.dom0, self.path, self.domid = dom0, path, domid
        self.data = bytearray(size)
        self.offer: dict[str, Any] = {"max-ring-page-order": 4, "multi-queue-max-queues": 4}
        self.keys: dict[str, Any] = {
            "sectors": size // 512,
            "sector-size": 512,
            "info": 0,
            "feature-flush-cache": 1,
            "feature-barrier": 1,
            "feature-discard": 1,
            "discard-granularity": 512,
            "discard-alignment": 0,
            "discard-secure": 1,
            "feature-persistent": 0,
        }
        for key, value in keys.items():
            name = key.replace("_", "-")
            (self.offer if name in self.offer or name == "feature-max-indirect-segments" else self.keys)[name] = value
        self.answer: Callable[[Request, Answer], list[Answer]] = lambda request, honest: [honest]
        self.serving = True  # off: requests stay on the ring
        self.requests: list[Request] = []
        self.rings: list[Ring] = []
        self.front_keys: dict[str, str] = {}
        self.errors: list[BaseException] = []
        self.persistent: dict[int, Any] = {}
        self.keep_mapped = False
        self._stop = False
        self._events = dom0.open_events()
        self._thread = threading.Thread(target=self._guarded, daemon=True)

    # Life

    def start(self) -> Backend:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop = True
        if self._thread.is_alive():
            self._thread.join(10)
        self.disconnect()
        self._events.close()

    def say(self, state: int, **keys: Any) -> None:
        def write(tx: int) -> None:
            for key, value in keys.items():
                self.dom0.store.write(f"{self.path}/{key}", value, tx)
            self.dom0.store.write(f"{self.path}/state", state, tx)

        self.dom0.store.transaction(write)

    def front_state(self) -> int:
        return int(self.dom0.store.read(f"{self.front}/state") or 0)

    @property
    def front(self) -> str:
        return (self.dom0.store.read(f"{self.path}/frontend") or b"").decode()

    def resize(self, size: int) -> None:
        self.data.extend(bytes(max(0, size - len(self.data))))
        self.say(CONNECTED, sectors=size // 512)

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.errors.append(error)

    def _run(self) -> None:
        self.say(INIT_WAIT, **self.offer)
        while not self._stop and self.front_state() != 3:
            time.sleep(0.002)
        if self._stop:
            return
        self.connect()
        self.say(CONNECTED, **self.keys)
        while not self._stop:
            self._events.wait(0.02)
            if self.serving:
                for ring in self.rings:
                    self.serve(ring)
            if self.rings and self.front_state() in (5, 6):
                self.disconnect()
                self.say(CLOSED)

    def connect(self) -> None:
        store, front = self.dom0.store, self.front

        def key(name: str) -> str:
            self.front_keys[name] = (store.read(f"{front}/{name}") or b"").decode()
            return self.front_keys[name]

        order = int(key("ring-page-order") or 0)
        count = int(key("multi-queue-num-queues") or 1)
        abi = blkif.abi_of(key("protocol") or None)
        for i in range(count):
            at = f"queue-{i}/" if count > 1 else ""
            names = [f"{at}ring-ref{j}" for j in range(1 << order)] if order else [f"{at}ring-ref"]
            mapping = self.dom0.grants.map(self.domid, [int(key(name)) for name in names])
            end = np.zeros(1, RING_END)
            size = blkif.ENTRY_SIZE[abi]
            assert back_end(int(end.ctypes.data), mapping.address, ring_entries(PAGE_SIZE << order, size), size) == 0
            port = self._events.bind_interdomain(self.domid, int(key(f"{at}event-channel")))
            self.rings.append(Ring(i, mapping, port, end, abi))

    def disconnect(self) -> None:
        for ring in self.rings:
            for mapping in ring.held:
                mapping.unmap()
            ring.mapping.unmap()
            self._events.unbind(ring.port)
        self.rings.clear()
        for mapping in self.persistent.values():
            mapping.unmap()
        self.persistent.clear()

    # Requests

    def serve(self, ring: Ring) -> None:
        size = blkif.ENTRY_SIZE[ring.abi]
        raw = np.zeros(64 * size, np.uint8)
        while True:
            n = take(ring.at, int(raw.ctypes.data), size, 64)
            assert n >= 0, "the frontend corrupted its ring"
            for i in range(n):
                request = self.parse(ring, raw[i * size : (i + 1) * size])
                self.requests.append(request)
                honest = (request.id, request.op, self.execute(ring, request))
                for answer in self.answer(request, honest):
                    self.respond(ring, answer)
            if n and push(ring.at):
                self._events.notify(ring.port)
            if not n and not final_check(ring.at):
                return

    def respond(self, ring: Ring, answer: Answer) -> None:
        at = slot(ring.at, int(ring.end[0]["prod_pvt"]))
        ident = answer[0] - (1 << 64) if answer[0] >> 63 else answer[0]
        blkif.put_response(at, ring.abi, ident, answer[1], answer[2])
        advance_prod(ring.at, 1)

    def publish(self, ring: Ring, *answers: Answer) -> None:
        """Put answers that nobody asked for."""
        for answer in answers:
            self.respond(ring, answer)
        push(ring.at)
        self._events.notify(ring.port)

    def parse(self, ring: Ring, raw: Any) -> Request:
        r = np.frombuffer(raw.tobytes(), blkif.REQUEST[ring.abi])[0]
        op, ident, sector = int(r["operation"]), int(r["id"]), int(r["sector_number"])
        if op == blkif.OP_DISCARD:
            d = np.frombuffer(raw.tobytes()[: blkif.DISCARD[ring.abi].itemsize], blkif.DISCARD[ring.abi])[0]
            return Request(ring.index, ident, op, sector, [], int(d["nr_sectors"]), int(d["flag"]))
        if op != blkif.OP_INDIRECT:
            segments = [(int(s["gref"]), int(s["first_sect"]), int(s["last_sect"])) for s in r["seg"]]
            return Request(ring.index, ident, op, sector, segments[: int(r["nr_segments"])])
        i = np.frombuffer(raw.tobytes()[: blkif.INDIRECT[ring.abi].itemsize], blkif.INDIRECT[ring.abi])[0]
        count = int(i["nr_segments"])
        table = b"".join(
            self.copy_out(int(gref)) for gref in i["indirect_grefs"][: -(-count // blkif.SEGMENTS_PER_INDIRECT_PAGE)]
        )
        found = np.frombuffer(table, blkif.SEGMENT)[:count]
        segments = [(int(s["gref"]), int(s["first_sect"]), int(s["last_sect"])) for s in found]
        return Request(ring.index, ident, int(i["indirect_op"]), int(i["sector_number"]), segments, indirect=True)

    def map(self, gref: int, readonly: bool) -> Any:
        """A mapping of one page; kept where grants are persistent."""
        if not int(self.keys["feature-persistent"]):
            return self.dom0.grants.map(self.domid, [gref], readonly=readonly)
        if gref not in self.persistent:
            self.persistent[gref] = self.dom0.grants.map(self.domid, [gref])
        return self.persistent[gref]

    def let_go(self, ring: Ring | None, mapping: Any) -> None:
        if self.keep_mapped and ring is not None:
            ring.held.append(mapping)
        elif not int(self.keys["feature-persistent"]):
            mapping.unmap()

    def copy_out(self, gref: int) -> bytes:
        mapping = self.map(gref, True)
        data = ctypes.string_at(mapping.address, PAGE_SIZE)
        self.let_go(None, mapping)
        return data

    def execute(self, ring: Ring, request: Request) -> int:
        at = request.sector * 512
        if request.op == blkif.OP_DISCARD:
            self.data[at : at + request.sectors * 512] = bytes(request.sectors * 512)
            return blkif.RSP_OKAY
        for gref, first, last in request.segments:
            n = (last - first + 1) * 512
            if not 0 <= first <= last < 8 or at + n > len(self.data):
                return blkif.RSP_ERROR
            reading = request.op == blkif.OP_READ
            try:
                mapping = self.map(gref, not reading)
            except PlatformError:
                return blkif.RSP_ERROR
            if reading:
                ctypes.memmove(mapping.address + first * 512, bytes(self.data[at : at + n]), n)
            else:
                self.data[at : at + n] = ctypes.string_at(mapping.address + first * 512, n)
            self.let_go(ring, mapping)
            at += n
        return blkif.RSP_OKAY
