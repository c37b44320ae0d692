"""What a request asks for, by the shortest way to write blkif.h down: unpacked fields, integers without end."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

OKAY, ERROR, EOPNOTSUPP = 0, -1, -2
READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT = 0, 1, 2, 3, 5, 6
# Where the fields are, natural alignment and i386 packing.
HEAD = {64: "<BBH4xQQ", 32: "<BBHQQ"}
SEGMENTS_AT = {64: 24, 32: 20}


@dataclass
class Disk:
    """What a frontend may ask of a disk."""

    sectors: int = 1 << 20
    sector_size: int = 512
    unit: int = 512  # bytes in what the frontend calls a sector
    max_segments: int = 256
    readonly: bool = False
    flush: bool = True
    barrier: bool = True
    discard: bool = True
    secure: bool = True


@dataclass
class Plan:
    """An outcome: a status that is not OKAY rejects."""

    id: int
    operation: int
    status: int = OKAY
    kind: str = "rejected"
    sector: int = 0
    nr_sectors: int = 0
    indirect: int = 0
    segments: list[tuple[int, int, int]] = field(default_factory=list)  # gref, offset, length in bytes


class Rejected(Exception):
    """With the status of the response."""


def check(ok: bool, status: int = ERROR) -> None:
    """Reject unless ok."""
    if not ok:
        raise Rejected(status)


def segments(data: bytes, count: int, start: int, disk: Disk) -> list[tuple[int, int, int]]:
    """`count` segments, eight bytes each, of a transfer from byte `start` of the disk on."""
    out = []
    for i in range(count):
        gref, first, last = struct.unpack_from("<IBB", data, 8 * i)
        check(first <= last and (last + 1) * disk.unit <= 4096)
        out.append((gref, first * disk.unit, (last + 1 - first) * disk.unit))
    check(start + sum(length for _, _, length in out) <= disk.sectors * 512)
    check(start % disk.sector_size == 0 and all(length % disk.sector_size == 0 for _, _, length in out))
    return out


def plan(data: bytes, disk: Disk, abi: int = 64) -> Plan:
    """The outcome of a request as it stands on the ring."""
    operation = data[0]
    _, second, _, id, sector = struct.unpack_from(HEAD[abi], data)  # nr_segments, flag or indirect_op
    out = Plan(id, second if operation == INDIRECT else operation)
    try:
        if operation == DISCARD:
            plan_discard(data, disk, abi, out)
        elif operation == INDIRECT:
            plan_indirect(data, disk, sector, out)
        else:
            plan_direct(data, disk, abi, second, sector, out)
    except Rejected as e:
        out.status = e.args[0]
        out.kind = "rejected"
    return out


def plan_direct(data: bytes, disk: Disk, abi: int, nr: int, sector: int, out: Plan) -> None:
    """READ, WRITE, WRITE_BARRIER, FLUSH_DISKCACHE; the last two may come without data."""
    offered = {READ: True, WRITE: True, BARRIER: disk.barrier, FLUSH: disk.flush}
    check(offered.get(out.operation, False), EOPNOTSUPP)
    check(nr <= 11 and (nr > 0 or out.operation in (BARRIER, FLUSH)))
    check(not (disk.readonly and nr > 0 and out.operation != READ))
    if nr:
        at = SEGMENTS_AT[abi]
        out.segments = segments(data[at : at + 8 * nr], nr, sector * disk.unit, disk)
        out.sector = sector * disk.unit // 512
        out.nr_sectors = sum(length for _, _, length in out.segments) // 512
    out.kind = {READ: "read", WRITE: "write", BARRIER: "barrier", FLUSH: "flush"}[out.operation]


def plan_discard(data: bytes, disk: Disk, abi: int, out: Plan) -> None:
    """struct blkif_request_discard."""
    _, flag, _, _, sector, count = struct.unpack_from(HEAD[abi] + "Q", data)
    check(disk.discard, EOPNOTSUPP)
    check(not disk.readonly)
    start, length = sector * disk.unit, count * disk.unit
    check(start + length <= disk.sectors * 512 and start % disk.sector_size == 0 and length % disk.sector_size == 0)
    out.sector, out.nr_sectors = start // 512, length // 512
    out.kind = "secure discard" if disk.secure and flag & 1 else "discard"


def plan_indirect(data: bytes, disk: Disk, sector: int, out: Plan) -> None:
    """struct blkif_request_indirect; its segments are in pages of the guest."""
    nr = struct.unpack_from("<H", data, 2)[0]
    check(disk.max_segments > 0, EOPNOTSUPP)
    check(out.operation in (READ, WRITE) and 0 < nr <= disk.max_segments)
    check(not (disk.readonly and out.operation == WRITE))
    out.indirect, out.sector = nr, sector * disk.unit // 512
    out.kind = "read" if out.operation == READ else "write"


def finish_indirect(planned: Plan, pages: bytes, disk: Disk, wire_sector: int) -> Plan:
    """The same request with its segments there."""
    out = Plan(planned.id, planned.operation, OKAY, planned.kind, planned.sector, 0, planned.indirect)
    try:
        out.segments = segments(pages, planned.indirect, wire_sector * disk.unit, disk)
        out.nr_sectors = sum(length for _, _, length in out.segments) // 512
    except Rejected as e:
        out.status, out.kind = e.args[0], "rejected"
    return out
