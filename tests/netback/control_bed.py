"""A CONTROL with its memory and its naive twin, frames to be hashed, and requests to be made."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import strategies as st

from netback.control import conclude, look, mapped, stored
from netback.control_records import (
    CONTROL,
    DO_FETCH,
    DO_MAP,
    DO_NOTHING,
    DO_STORE,
    HASHES,
    MOST_KEY,
    MOST_MAPPING,
)
from netback.frame import flow_of, parse
from netback.hashing import choose_queue
from netback.records import PACKET, PORT
from netback.staging import STAGE, find, format_stage, page_of
from pvdrivers.platform import GRANT_OP
from rings import netif
from rings.jit import kernel
from tests.netback.naive_control import ALL, OKAY, Answer, Vif, mappable
from tests.rings.guard import Guarded

QUEUES = 3
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
"""Microsoft's, "Verifying the RSS hash calculation"."""
GNTST_bad_gntref = -3


@kernel
def find_entry(sa: int, gref: int) -> int:
    return find(sa, gref)


class Bed:
    """A CONTROL with its memory, an inaccessible page behind each part; and the twin beside it."""

    def __init__(self, queues: int = QUEUES, limit: int = 512) -> None:
        self.control, self.hashes, self.payload = Guarded(CONTROL.itemsize), Guarded(HASHES.itemsize), Guarded(4096)
        self.request = Guarded(netif.CTRL_REQUEST.itemsize)
        self.row = self.control.bytes.view(CONTROL)[0]
        self.row["hashes"], self.row["queues"] = self.hashes.address, queues
        self.row["request"], self.row["payload"] = self.request.address, self.payload.address
        self.stages = np.zeros(queues, STAGE)
        for q in range(queues):
            format_stage(self.stages.ctypes.data + q * STAGE.itemsize, limit)
        self.row["stages"] = self.stages.ctypes.data
        self.mapped: set[int] = set()  # handles
        self._handle = 0
        self.port = np.zeros(1, PORT)
        self.port[0]["hashes"], self.port[0]["n_out"] = self.hashes.address, queues
        self.twin = Vif(queues, limit=limit)

    def ask(self, kind: int, *data: int, page: bytes | None = None, writable: bool = True) -> Answer:
        """The response, held against the twin's; and what is in force."""
        self.twin.writable = writable
        words = (*data, 0, 0, 0)[:3]
        self.request.fill(struct.pack("<HH3I", 7, kind, *words))
        look(self.control.address)
        if self.row["next"] == DO_FETCH:
            n = int(self.row["nbytes"])
            assert 0 < n <= 4096
            assert self.row["gref"] == words[1 if kind in (9, 10) else 0]
            self.payload.bytes[:] = 0xEE  # of another request
            if page is not None:
                self.payload.fill(page[:n].ljust(n, b"\0"))
            conclude(self.control.address, 0 if page is not None else GNTST_bad_gntref)
        if self.row["next"] == DO_MAP:
            self._map()
        elif self.row["next"] == DO_STORE:
            ops = np.zeros(512, GRANT_OP)
            count = stored(self.control.address, 0 if writable else GNTST_bad_gntref, ops.ctypes.data)
            self._unmap(ops, count)
        assert self.row["next"] == DO_NOTHING
        for memory in (self.control, self.hashes, self.payload, self.request):
            memory.check()
        got = int(self.row["status"]), int(self.row["data"])
        assert got == self.twin.request(kind, words, None if page is None else page.ljust(4096, b"\0"))
        self.same()
        if kind == netif.CTRL_DEL_GREF_MAPPING and page is not None and self.twin.statuses and got[0] == OKAY:
            statuses = [one[2] for one in struct.iter_unpack("<IHH", self.payload.bytes[: words[2] * 8].tobytes())]
            assert statuses == self.twin.statuses[: words[2]]
        return got

    def _map(self) -> None:
        """As a seam does it: some cannot be had."""
        ops = np.zeros(512, GRANT_OP)
        count = int(self.row["count"])
        for op, (gref, _, _) in zip(ops, struct.iter_unpack("<IHH", self.payload.bytes[: count * 8].tobytes())):
            op["status"], op["handle"] = (0, self._handle) if mappable(gref) else (GNTST_bad_gntref, -1)
            op["address"] = 0x100000 + (gref << 12)
            if mappable(gref):
                self.mapped.add(self._handle)
                self._handle += 1
        self._unmap(ops, mapped(self.control.address, ops.ctypes.data))

    def _unmap(self, ops: np.ndarray, count: int) -> None:
        for handle in ops["handle"][:count]:
            self.mapped.remove(int(handle))  # each once

    def same(self) -> None:
        both = self.hashes.bytes.view(HASHES)[0]
        h = both["hash"][both["which"] & 1]
        assert (h["algorithm"], h["types"], h["entries"]) == (
            self.twin.algorithm, self.twin.types, len(self.twin.mapping),
        )  # fmt: skip
        assert h["key"].tobytes() == self.twin.key.ljust(MOST_KEY, b"\0")
        there = set()
        for q in range(self.twin.queues):
            sa = self.stages.ctypes.data + q * STAGE.itemsize
            assert int(self.stages[q]["used"]) == sum(one == q for one, _ in self.twin.staged)
            for gref in range(80):
                flags = self.twin.staged.get((q, gref))
                address = 0 if flags is None else 0x100000 + (gref << 12)
                assert page_of(sa, gref, 0) == address
                assert page_of(sa, gref, 1) == (0 if flags else address)
                if flags is not None:
                    there.add(int(self.stages[q]["entries"][find_entry(sa, gref)]["handle"]))
        if all(gref < 80 for _, gref in self.twin.staged):
            assert there == self.mapped
        assert h["mapping"].tolist() == self.twin.mapping + [0] * (MOST_MAPPING - len(self.twin.mapping))

    def send(self, frame: bytes, said: Answer | None = None) -> tuple[int, Answer | None]:
        """The queue of a packet and what is told with it, held against the twin's."""
        data, packet = Guarded(len(frame)).fill(frame), np.zeros(1, PACKET)
        pa = packet.ctypes.data
        packet[0]["data"], packet[0]["have"] = data.address, len(frame)
        packet[0]["said"] = 0 if said is None else said[0] << 32 | said[1]
        parse(pa)
        queue = int(choose_queue(self.port.ctypes.data, pa, self.twin.queues, 1))
        tell = int(packet[0]["tell"])
        told = (tell >> 32, tell & 0xFFFFFFFF) if tell else None
        version, ports = int(packet[0]["l3"]), None
        if packet[0]["csum_at"] - packet[0]["l4"] == 16:
            ports = frame[packet[0]["l4"] :][:4]
        found = self.twin.hash(version, frame[packet[0]["ip"] :], ports)
        assert (queue, told) == self.twin.steer(found, said, int(flow_of(pa)))
        return queue, told


def ipv4(protocol: int = 6, *, options: bytes = b"", fragment: int = 0, ports: bytes = b"\x0a\xea\x06\xe6") -> bytes:
    head = bytes([0x45 + len(options) // 4, 0, 0, 60, 0, 0]) + fragment.to_bytes(2, "big") + bytes([64, protocol, 0, 0])
    return bytes(12) + b"\x08\0" + head + bytes([66, 9, 149, 187, 161, 142, 100, 80]) + options + ports + bytes(20)


def ipv6(protocol: int = 6, ports: bytes = b"\x0a\xea\x06\xe6") -> bytes:
    addresses = bytes.fromhex("3ffe250102001fff0000000000000007" "3ffe2501020000030000000000000001")
    return bytes(12) + b"\x86\xdd" + bytes([0x60, 0, 0, 0, 0, 60, protocol, 64]) + addresses + ports + bytes(20)


def hashing(types: int = ALL, mapping: int = 0) -> Bed:
    bed = Bed()
    bed.ask(netif.CTRL_SET_HASH_ALGORITHM, netif.HASH_ALGORITHM_TOEPLITZ)
    bed.ask(netif.CTRL_SET_HASH_FLAGS, types)
    bed.ask(netif.CTRL_SET_HASH_KEY, 9, 40, page=KEY)
    bed.ask(netif.CTRL_SET_HASH_MAPPING_SIZE, mapping)
    return bed


def mapping(*entries: int) -> bytes:
    return struct.pack(f"<{len(entries)}I", *entries)


def grefs(*entries: int, flags: int = 0) -> bytes:
    return b"".join(struct.pack("<IHH", gref, flags, 0x5555) for gref in entries)


WORDS = st.one_of(
    st.integers(0, 5), st.integers(0, 130), st.sampled_from([0x7FFFFFFF, 0x80000000, 0xFFFFFF80, 0xFFFFFFFF]),
    st.integers(0, 0xFFFFFFFF),
)  # fmt: skip
REQUESTS = st.tuples(
    st.one_of(st.integers(1, 7), st.integers(0, 12), st.integers(0, 0xFFFF)), WORDS, WORDS, WORDS,
    st.one_of(st.none(), st.binary(max_size=64), st.lists(st.integers(0, 4), max_size=128).map(lambda x: mapping(*x))),
)  # fmt: skip
