"""What the two ends of a disk say to each other in xenstore: pure, parsed and checked. blkif.h's long comment.

Of a backend nothing is believed: a value that no honest backend would write is a ValueError that names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rings import blkif

__all__ = [
    "ABIS",
    "NOTHING",
    "DiskInfo",
    "Offer",
    "frontend_keys",
    "is_negotiated",
    "read_info",
    "read_offer",
    "read_sectors",
    "resized",
    "revoked",
]

Read = Callable[[str], bytes | None]
"""Reads a key of the backend's directory; None if it is not there."""

ABIS: Mapping[str, tuple[int, str]] = {
    "x86_64": (blkif.ABI_64, blkif.PROTOCOL_X86_64),
    "x86_32": (blkif.ABI_32, blkif.PROTOCOL_X86_32),
    "arm": (blkif.ABI_64, blkif.PROTOCOL_ARM),
}
"""Name of an ABI -> the layout of its requests, and what the key `protocol` says."""

_MOST_SECTORS = 1 << 54  # what a byte offset of 63 bits reaches


@dataclass(frozen=True)
class Offer:
    """What a backend publishes before InitWait: how large a ring, and how many, it will map."""

    ring_order: int
    queues: int


@dataclass(frozen=True)
class DiskInfo:
    """What a backend publishes before Connected. `sectors` are of 512 bytes; all other sizes are bytes."""

    sectors: int
    sector_size: int
    physical_sector_size: int
    readonly: bool
    removable: bool
    cdrom: bool
    flags: int  # VDISK_*, as they came
    flush: bool
    barrier: bool
    discard: bool
    discard_secure: bool
    discard_granularity: int
    discard_alignment: int
    persistent: bool
    indirect: int  # most segments in an indirect request; 0: there are none

    @property
    def size(self) -> int:
        """Bytes."""
        return self.sectors * blkif.SECTOR_SIZE

    @property
    def features(self) -> tuple[str, ...]:
        """What the backend can do, in words."""
        offered = {
            "flush": self.flush,
            "barrier": self.barrier,
            "discard": self.discard,
            "secure-discard": self.discard_secure,
            "persistent": self.persistent,
            f"indirect-{self.indirect}": self.indirect > 0,
        }
        return tuple(name for name, there in offered.items() if there)


NOTHING = DiskInfo(0, 512, 512, True, False, False, 0, False, False, False, False, 512, 0, False, 0)
"""What is known of a disk that was never connected."""


def resized(info: DiskInfo, sectors: int) -> DiskInfo:
    """The same disk with another size."""
    return replace(info, sectors=sectors)


def revoked(info: DiskInfo, op: int) -> DiskInfo:
    """The same disk without a feature that a backend has answered with EOPNOTSUPP."""
    lost = {
        blkif.OP_FLUSH_DISKCACHE: {"flush": False},
        blkif.OP_WRITE_BARRIER: {"barrier": False},
        blkif.OP_DISCARD: {"discard": False, "discard_secure": False},
    }
    return replace(info, **lost.get(op, {}))


def _number(read: Read, key: str, default: int, most: int) -> int:
    raw = read(key)
    if raw is None:
        return default
    text = raw.decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 20) or int(text) > most:
        raise ValueError(f"key {key} is {text[:32]!r}, not a number from 0 to {most}")
    return int(text)


def read_offer(read: Read) -> Offer:
    """Parse the keys of InitWait. Raises ValueError."""
    order = _number(read, blkif.KEY_MAX_RING_PAGE_ORDER, 0, 64)
    queues = _number(read, blkif.KEY_MAX_QUEUES, 1, 1 << 16)
    return Offer(min(order, blkif.MAX_RING_PAGE_ORDER), max(1, queues))


def read_sectors(read: Read) -> int:
    """The size of the disk, in 512 bytes. Raises ValueError."""
    if read(blkif.KEY_SECTORS) is None:
        raise ValueError(f"key {blkif.KEY_SECTORS} is missing")
    return _number(read, blkif.KEY_SECTORS, 0, _MOST_SECTORS)


def read_info(read: Read) -> DiskInfo:
    """Parse the keys of Connected. Raises ValueError."""

    def switch(key: str) -> bool:
        return _number(read, key, 0, (1 << 32) - 1) != 0

    sector_size = _number(read, blkif.KEY_SECTOR_SIZE, 512, 4096)
    if sector_size < 512 or sector_size & (sector_size - 1):
        raise ValueError(f"key {blkif.KEY_SECTOR_SIZE} is {sector_size}, not 512, 1024, 2048 or 4096")
    flags = _number(read, blkif.KEY_INFO, 0, (1 << 32) - 1)
    indirect = _number(read, blkif.KEY_MAX_INDIRECT_SEGMENTS, 0, (1 << 32) - 1)
    return DiskInfo(
        sectors=read_sectors(read),
        sector_size=sector_size,
        physical_sector_size=_number(read, blkif.KEY_PHYSICAL_SECTOR_SIZE, sector_size, 1 << 31),
        readonly=bool(flags & blkif.VDISK_READONLY),
        removable=bool(flags & blkif.VDISK_REMOVABLE),
        cdrom=bool(flags & blkif.VDISK_CDROM),
        flags=flags,
        flush=switch(blkif.KEY_FLUSH),
        barrier=switch(blkif.KEY_BARRIER),
        discard=switch(blkif.KEY_DISCARD),
        discard_secure=switch(blkif.KEY_DISCARD_SECURE),
        discard_granularity=_number(read, blkif.KEY_DISCARD_GRANULARITY, sector_size, 1 << 40),
        discard_alignment=_number(read, blkif.KEY_DISCARD_ALIGNMENT, 0, 1 << 40),
        persistent=switch(blkif.KEY_PERSISTENT),
        # Linux: what fits into a request anyway is not worth a page of descriptors.
        indirect=min(indirect, blkif.MAX_INDIRECT_SEGMENTS) if indirect > blkif.MAX_SEGMENTS else 0,
    )


def frontend_keys(
    queues: Sequence[tuple[Sequence[int], int]], ring_order: int, protocol: str, persistent: bool
) -> dict[str, str]:
    """What a frontend writes before Initialised. Of each queue: the grefs of its ring, and its event channel.

    With one page there is no ring-page-order at all: a backend that sees one, even 0, may look for ring-ref0. With
    one queue the keys are flat, and with more there are none at the top (blkif.h, "Multi-queue").
    """
    keys = {blkif.KEY_PROTOCOL: protocol, blkif.KEY_PERSISTENT: str(int(persistent))}
    if ring_order:
        keys[blkif.KEY_RING_PAGE_ORDER] = str(ring_order)
    if len(queues) > 1:
        keys[blkif.KEY_NUM_QUEUES] = str(len(queues))
    for i, (grefs, port) in enumerate(queues):
        at = f"queue-{i}/" if len(queues) > 1 else ""
        if ring_order:
            for j, gref in enumerate(grefs):
                keys[f"{at}{blkif.KEY_RING_REF}{j}"] = str(gref)
        else:
            keys[f"{at}{blkif.KEY_RING_REF}"] = str(grefs[0])
        keys[f"{at}{blkif.KEY_EVENT_CHANNEL}"] = str(port)
    return keys


def is_negotiated(key: str) -> bool:
    """Whether a key in a frontend's directory is left over from an earlier connection, and has to go."""
    return key.startswith((blkif.KEY_RING_REF, "queue-")) or key in (
        blkif.KEY_RING_PAGE_ORDER,
        blkif.KEY_EVENT_CHANNEL,
        blkif.KEY_NUM_QUEUES,
        blkif.KEY_PERSISTENT,
        blkif.KEY_PROTOCOL,
    )
