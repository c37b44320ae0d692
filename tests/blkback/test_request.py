"""blkback.request against its naive twin: any bytes, bytes that are nearly legal, and every operation there is."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from blkback.records import BLK_REQ, DISK, K_REJECT, KIND_NAMES
from blkback.request import check_segments, plan
from rings.blkif import to_native
from tests.blkback import naive
from tests.blkback.naive import Disk, Plan
from tests.rings.guard import Guarded, guarded

PLENTY = 1 << 20
OPERATIONS = (0, 1, 2, 3, 5, 6)
LAYOUT = {64: "<BBH4xQQ", 32: "<BBHQQ"}


class Planned:
    """A plan by the kernel, everything it works on ending at an inaccessible page."""

    def __init__(self, data: bytes, disk: Disk, abi: int = 64) -> None:
        self.disk = Guarded(DISK.itemsize)
        row = self.disk.bytes.view(DISK)[0]
        row["sectors"] = disk.sectors
        row["sector_mask"] = disk.sector_size // 512 - 1
        row["unit_shift"] = (disk.unit // 512).bit_length() - 1
        row["max_segments"], row["readonly"] = disk.max_segments, disk.readonly
        row["can_flush"], row["can_barrier"] = disk.flush, disk.barrier
        row["can_discard"], row["can_secure"] = disk.discard, disk.secure
        self.request = guarded(data) if abi == 64 else Guarded(112)
        if abi == 32:
            slot = guarded(data)
            to_native(self.request.address, slot.address)
            slot.check()
        self.blk = Guarded(BLK_REQ.itemsize)
        self.blk.bytes[:] = 0xEE  # of a request before it
        self.room = Guarded(11 * 8)
        self.n = int(plan(self.request.address, self.blk.address, self.disk.address, self.room.address))
        self.check_guards()

    def check_guards(self) -> None:
        for memory in (self.disk, self.request, self.blk, self.room):
            memory.check()

    def indirect(self, pages: bytes, *, in_place: bool) -> None:
        """Go on with the copies of the indirect pages."""
        wire = guarded(pages)
        self.room = wire if in_place else Guarded(len(pages))
        args = (self.blk.address, self.disk.address, wire.address, len(pages) // 8, self.room.address)
        self.n = int(check_segments(*args))
        wire.check()
        self.check_guards()

    @property
    def row(self) -> Any:
        return self.blk.bytes.view(BLK_REQ)[0]

    def result(self) -> Plan:
        """In the words of the naive twin."""
        row = self.row
        status = int(row["status"])
        if row["kind"] == K_REJECT:
            return Plan(int(row["id"]) % (1 << 64), int(row["operation"]), status)
        segments = []
        for gref, offset, length in struct.iter_unpack("<IHH", self.room.bytes[: max(self.n, 0) * 8].tobytes()):
            segments.append((gref, offset, length))
        return Plan(
            int(row["id"]) % (1 << 64),
            int(row["operation"]),
            status,
            KIND_NAMES[int(row["kind"])],
            int(row["sector"]),
            int(row["nr_sectors"]),
            int(row["indirect"]),
            segments,
        )


def agree(planned: Planned, disk: Disk, want: Plan) -> None:
    """The kernel's outcome is the twin's, and is safe whatever the twin thinks."""
    row = planned.row
    if want.status != naive.OKAY:
        assert planned.n <= 0
        assert row["kind"] == K_REJECT
        assert (int(row["status"]), int(row["operation"])) == (want.status, want.operation)
        assert int(row["id"]) % (1 << 64) == want.id
        return
    got = planned.result()
    if want.indirect and not want.segments and want.sector > 1 << 62:
        want.sector = -1  # nothing that a sum could wrap; its segments, at least one, will be beyond the end
    assert got == want
    assert planned.n == (-1 if got.indirect and not got.segments else len(got.segments))
    safe(got, disk)


def safe(got: Plan, disk: Disk) -> None:
    """Every segment in its page, the range in the disk, and both of the same length."""
    for gref, offset, length in got.segments:
        assert 0 <= gref < 1 << 32
        assert length >= 1 and offset + length <= 4096
        assert length % disk.sector_size == 0
    if got.segments:
        assert sum(length for _, _, length in got.segments) == got.nr_sectors * 512
    if not got.indirect or got.segments:
        assert got.sector >= 0 and got.sector + got.nr_sectors <= disk.sectors


flags = st.sampled_from([True, True, True, False])


@st.composite
def disks(draw: st.DrawFn) -> Disk:
    """Disks of all shapes, the 512-unit rule and the compatibility switch among them."""
    sector_size = draw(st.sampled_from([512, 512, 1024, 2048, 4096]))
    sectors = draw(st.sampled_from([0, 1, 8, 2048, PLENTY, 1 << 54]))
    return Disk(
        sectors=sectors - sectors % (sector_size // 512),
        sector_size=sector_size,
        unit=draw(st.sampled_from([512, 512, sector_size])),
        max_segments=draw(st.sampled_from([0, 1, 12, 256, 4096])),
        readonly=draw(st.sampled_from([False, False, True])),
        flush=draw(flags),
        barrier=draw(flags),
        discard=draw(flags),
        secure=draw(flags),
    )


@st.composite
def sectors_near(draw: st.DrawFn, disk: Disk) -> int:
    """A sector number: in the disk, around its end, or where sums wrap, in whatever unit."""
    end = disk.sectors * 512 // disk.unit
    near = draw(st.sampled_from([0, 0, end, end, 1 << 32, 1 << 51, 1 << 54, 1 << 60, 1 << 62, 1 << 63, 1 << 64]))
    return (near + draw(st.sampled_from([0, 0, 1, 8, 64, -1, -8, -16, -88, -1024]))) % (1 << 64)


@st.composite
def wire_segments(draw: st.DrawFn, disk: Disk, count: int, broken: bool) -> bytes:
    """`count` segments, legal ones but for one if `broken`."""
    units = 4096 // disk.unit
    step = max(1, disk.sector_size // disk.unit)
    out = []
    for _ in range(count):
        first = draw(st.integers(0, units // step - 1)) * step
        last = draw(st.integers(first // step + 1, units // step)) * step - 1
        out.append([draw(st.integers(0, (1 << 32) - 1)), first, last, draw(st.integers(0, 0xFFFF))])
    if broken and count:
        bad = draw(st.integers(0, count - 1))
        out[bad][1:3] = draw(st.sampled_from([(1, 0), (0, units), (7, 8), (255, 255), (255, 0), (0, 255), (0, 0)]))
    return b"".join(struct.pack("<IBBH", *seg) for seg in out)


@st.composite
def nearly_legal(draw: st.DrawFn, abi: int) -> tuple[Disk, bytes]:
    """A request that is wrong in at most a few places."""
    disk = draw(disks())
    op = draw(st.sampled_from([*OPERATIONS, *OPERATIONS, 4, 7, 255]))
    head = (draw(st.integers(0, 0xFFFF)), draw(st.integers(0, (1 << 64) - 1)), draw(sectors_near(disk)))
    if op == naive.DISCARD:
        body = struct.pack("<Q", draw(sectors_near(disk)))
        data = struct.pack(LAYOUT[abi], op, draw(st.sampled_from([0, 1, 2, 3, 255])), *head) + body
    elif op == naive.INDIRECT:
        nr = draw(st.sampled_from([0, 1, 11, 12, disk.max_segments, disk.max_segments + 1, 0xFFFF]))
        inner = draw(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 6, 255]))
        data = struct.pack(LAYOUT[abi], op, inner, nr, *head[1:])
    else:
        nr = draw(st.sampled_from([0, 1, 1, 2, 10, 11, 12, 255]))
        data = struct.pack(LAYOUT[abi], op, nr, *head)
        data += draw(wire_segments(disk, min(nr, 11), draw(st.integers(0, 3)) == 0))
    return disk, data.ljust(112 if abi == 64 else 108, b"\xcc")


@given(data=st.binary(min_size=112, max_size=112), disk=disks())
@example(data=bytes(112), disk=Disk())
@example(data=b"\xff" * 112, disk=Disk())
def test_any_bytes(data: bytes, disk: Disk) -> None:
    agree(Planned(data, disk), disk, naive.plan(data, disk))


@given(op=st.sampled_from(OPERATIONS), data=st.binary(min_size=111, max_size=111), disk=disks())
def test_any_bytes_after_an_operation_that_is_known(op: int, data: bytes, disk: Disk) -> None:
    data = bytes([op]) + data
    agree(Planned(data, disk), disk, naive.plan(data, disk))


@given(data=st.binary(min_size=108, max_size=108), disk=disks())
def test_any_bytes_of_i386(data: bytes, disk: Disk) -> None:
    agree(Planned(data, disk, 32), disk, naive.plan(data, disk, 32))


@given(case=nearly_legal(64))
def test_nearly_legal(case: tuple[Disk, bytes]) -> None:
    disk, data = case
    agree(Planned(data, disk), disk, naive.plan(data, disk))


@given(case=nearly_legal(32))
def test_nearly_legal_of_i386(case: tuple[Disk, bytes]) -> None:
    disk, data = case
    agree(Planned(data, disk, 32), disk, naive.plan(data, disk, 32))


@st.composite
def indirect_cases(draw: st.DrawFn) -> tuple[Disk, int, bytes]:
    """(disk, sector, what is in the indirect pages)."""
    disk = replace(draw(disks()), max_segments=draw(st.sampled_from([1, 12, 256, 4096])), readonly=False)
    count = draw(st.sampled_from([1, 2, 11, 12, 40]))
    if draw(st.booleans()):
        # As many as there may be, from a few that are drawn.
        few = draw(wire_segments(disk, 3, False))
        pages = (few * (disk.max_segments // 3 + 1))[: disk.max_segments * 8]
        if draw(st.booleans()):
            at = draw(st.integers(0, disk.max_segments - 1)) * 8
            pages = pages[:at] + draw(wire_segments(disk, 1, True)) + pages[at + 8 :]
    elif draw(st.booleans()):
        count = min(count, disk.max_segments)
        pages = draw(wire_segments(disk, count, draw(st.booleans())))
    else:
        count = min(count, disk.max_segments)
        pages = draw(st.binary(min_size=count * 8, max_size=count * 8))
    return disk, draw(sectors_near(disk)), pages


@given(case=indirect_cases(), abi=st.sampled_from([64, 32]), op=st.sampled_from([0, 1]), in_place=st.booleans())
def test_indirect_segments(case: tuple[Disk, int, bytes], abi: int, op: int, in_place: bool) -> None:
    disk, sector, pages = case
    data = struct.pack(LAYOUT[abi], naive.INDIRECT, op, len(pages) // 8, 7, sector)
    data = data.ljust(112 if abi == 64 else 108, b"\xcc")
    planned = Planned(data, disk, abi)
    want = naive.plan(data, disk, abi)
    if planned.row["kind"] == K_REJECT:  # a sector that no disk has: the kernel need not look at the pages to know
        assert naive.finish_indirect(want, pages, disk, sector).status == naive.ERROR
        return
    assert planned.n == -1 and want.status == naive.OKAY
    planned.indirect(pages, in_place=in_place)
    agree(planned, disk, naive.finish_indirect(want, pages, disk, sector))


def test_every_operation_with_every_count() -> None:
    few = struct.pack("<IBBH", 9, 0, 7, 0) * 11
    feature_sets = [
        Disk(),
        Disk(flush=False, barrier=False, discard=False, secure=False, max_segments=0),
        Disk(readonly=True),
    ]
    for disk in feature_sets:
        for op in range(256):
            for second in (0, 1, 2, 11, 12, 255):
                data = struct.pack("<BBH4xQQ", op, second, 5, 1, 8) + few
                planned = Planned(data, disk)
                agree(planned, disk, naive.plan(data, disk))


def test_the_unit_is_512_bytes_with_sectors_of_4096() -> None:
    """Xen 4.20's blkif.h; `unit` 4096 is the switch for those that count otherwise."""
    disk = Disk(sectors=800, sector_size=4096)
    seg = struct.pack("<IBBH", 1, 0, 7, 0).ljust(88, b"\0")
    at_792 = struct.pack("<BBH4xQQ", 0, 1, 0, 0, 792) + seg
    assert Planned(at_792, disk).result().sector == 792
    for wrong in (793, 796, 800):
        assert Planned(struct.pack("<BBH4xQQ", 0, 1, 0, 0, wrong) + seg, disk).result().status == naive.ERROR
    half = struct.pack("<BBH4xQQ", 0, 1, 0, 0, 0) + struct.pack("<IBBH", 1, 0, 3, 0).ljust(88, b"\0")
    assert Planned(half, disk).result().status == naive.ERROR
    compat = replace(disk, unit=4096)
    whole = struct.pack("<IBBH", 1, 0, 0, 0).ljust(88, b"\0")
    last = Planned(struct.pack("<BBH4xQQ", 0, 1, 0, 0, 99) + whole, compat).result()
    assert (last.sector, last.nr_sectors, last.segments) == (792, 8, [(1, 0, 4096)])
    assert Planned(struct.pack("<BBH4xQQ", 0, 1, 0, 0, 100) + whole, compat).result().status == naive.ERROR
    assert Planned(at_792, compat).result().status == naive.ERROR


def test_a_request_says_nothing_about_the_one_before() -> None:
    """BLK_REQ is used again: an EOPNOTSUPP, a rejection and a flush in the same record."""
    disk = Disk(discard=False)
    row = np.zeros(1, BLK_REQ)
    for data, status, kind in (
        (struct.pack("<BBH4xQQ", 5, 0, 0, 1, 0).ljust(112, b"\0"), naive.EOPNOTSUPP, "rejected"),
        (struct.pack("<BBH4xQQ", 0, 0, 0, 2, 0).ljust(112, b"\0"), naive.ERROR, "rejected"),
        (struct.pack("<BBH4xQQ", 3, 0, 0, 3, (1 << 64) - 1).ljust(112, b"\0"), naive.OKAY, "flush"),
    ):
        planned = Planned(data, disk)
        args = (planned.request.address, row.ctypes.data, planned.disk.address, planned.room.address)
        assert plan(*args) == 0
        assert (int(row[0]["status"]), KIND_NAMES[int(row[0]["kind"])]) == (status, kind)
        assert (int(row[0]["sector"]) if kind == "flush" else 0, int(row[0]["nr_sectors"])) == (0, 0)
