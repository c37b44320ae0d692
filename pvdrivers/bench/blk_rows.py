"""What `pvdrivers bench blk` measures: each kind of work, where it may run, what it is measured beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ROWS", "Peer", "Place", "Work"]


@dataclass(frozen=True)
class Place:
    """Where the two ends run: indices into the two cores, None for wherever the scheduler likes."""

    name: str
    back: int | None  # serve, the storage daemon, fio
    front: int | None  # the guest, the daemon's client
    spin: bool = False  # both look again and again before they sleep
    iothread: bool = False  # qemu-storage-daemon: with a polling thread for the export

    def cpus(self, cpus: Sequence[int]) -> tuple[set[int] | None, set[int] | None]:
        """The cores of back and front."""
        return _cores(self.back, cpus), _cores(self.front, cpus)


def _cores(index: int | None, cpus: Sequence[int]) -> set[int] | None:
    return None if index is None else {cpus[index]}


ONE_CORE = Place("both ends on one core", 0, 0)
SPINNING = Place("guest and serve on a core each, spinning", 0, 1, spin=True)
ANYWHERE = Place("both ends anywhere", None, None)
FIO_ANYWHERE = Place("anywhere", None, None)
FIO_PINNED = Place("on that core", 0, None)
QEMU_ONE_CORE = Place("daemon and client on one core", 0, 0)
QEMU_SPINNING = Place("daemon (iothread, polling) and client (spinning) on a core each", 0, 1, True, True)
QEMU_ANYWHERE = Place("daemon and client anywhere", None, None)
RING_PLACE = Place("two processes on a core each, busy", 0, 1, spin=True)


@dataclass(frozen=True)
class Peer:
    """What stands beside ours. `kind`: fio, qemu or ring. Several places: the best of them is taken."""

    kind: str
    name: str
    target: float | None
    places: tuple[Place, ...]


FIO = "fio io_uring"
FIO_CORE = "fio io_uring, pinned"
QEMU = "qemu-storage-daemon vhost-user-blk"


def _fio(target: float | None) -> Peer:
    return Peer("fio", FIO, target, (FIO_ANYWHERE,))


def _pinned(target: float | None) -> Peer:
    return Peer("fio", FIO_CORE, target, (FIO_PINNED,))


@dataclass(frozen=True)
class Work:
    """One load, on a disk made of `store`: disk (a file, O_DIRECT), tmpfs or null.

    `policy` map: a grant a request and no copy, which is what fio does. Persistent grants have the guest copy all data.
    """

    key: str
    name: str
    places: tuple[Place, ...]
    peers: tuple[Peer, ...]
    store: str = "disk"
    op: str = "read"
    random: bool = True
    block_size: int = 4096
    depth: int = 32
    ring_order: int = 0
    policy: str = "map"
    figure: str = "rate"

    @property
    def rw(self) -> str:
        """In fio's words."""
        return ("rand" if self.random else "") + self.op


ROWS = (
    Work("rand32", "4 KiB random read, depth 32", (ONE_CORE,), (_fio(0.97), _pinned(None))),
    Work(
        "persistent", "4 KiB random read, depth 32, persistent grants", (ONE_CORE,), (_fio(None),),
        policy="persistent",
    ),
    Work(
        "rand128", "4 KiB random read, depth 128, four-page ring", (ONE_CORE,), (_fio(1.0), _pinned(None)),
        depth=128, ring_order=2,
    ),
    Work("depth1-spin", "4 KiB random read, depth 1, spinning", (SPINNING,), (_fio(1.3),), depth=1),
    Work("depth1", "4 KiB random read, depth 1", (ONE_CORE,), (_pinned(0.88),), depth=1),
    Work("tmpfs", "4 KiB random read, depth 32, file on tmpfs", (ONE_CORE,), (_pinned(0.9),), store="tmpfs"),
    Work(
        "seqread", "64 KiB sequential read, depth 16, indirect", (ONE_CORE,), (_fio(0.97), _pinned(None)),
        random=False, block_size=65536, depth=16, figure="bytes_per_second",
    ),
    Work(
        "seqwrite", "64 KiB sequential write, depth 16, indirect", (ONE_CORE,), (_fio(0.97), _pinned(None)),
        op="write", random=False, block_size=65536, depth=16, figure="bytes_per_second",
    ),
    Work("qemu", "4 KiB random read, depth 32", (ONE_CORE,), (Peer("qemu", QEMU, 1.28, (QEMU_ONE_CORE,)),)),
    Work(
        "qemu-best", "4 KiB random read, depth 32, best placement of each", (ONE_CORE, SPINNING, ANYWHERE),
        (Peer("qemu", QEMU, 1.05, (QEMU_ONE_CORE, QEMU_SPINNING, QEMU_ANYWHERE)),),
    ),
    Work(
        "null", "null: store, 4 KiB reads, full one-page ring", (SPINNING,),
        (Peer("ring", "the ring alone, full, one page", 0.15, (RING_PLACE,)),), store="null",
    ),
)  # fmt: skip
