"""Our blkfront in dom0, by loopback grants, against each backend that is there: the kernel's, QEMU's and our own.

The same cases for all. Where backends differ, the difference stands in OFFERS, and in docs/compatibility.md. What a
frontend that lies is told is in test_backends.py.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from pvdrivers.frontends.blkfront import Blkfront, Io
from pvdrivers.frontends.load import Load, Plan

from .backends import QEMU_READ_ONLY, Backend, Disk
from .stores import Stores
from .system import sh, until

MIB = 32
OFFERS: dict[str, dict[str, Any]] = {
    "kernel": {"barrier": True, "persistent": True, "indirect": 256, "queues": os.cpu_count(), "discard": True},
    "qemu": {"barrier": False, "persistent": False, "indirect": 0, "queues": 1, "discard": True},
    "ours": {"barrier": True, "persistent": True, "indirect": 256, "queues": 4, "discard": True},
}
"""What each offers for the same store, a loop device of dom0 (Linux 6.1, QEMU 7.2 as Debian 12 has them)."""


def closed(disk: Blkfront, peer: Disk) -> None:
    disk.close()
    peer.closed()


def test_the_same_cases_for_every_backend(attach: Callable[..., Disk]) -> None:
    """What it offers; every kind of request; and again after an orderly close, with other rings."""
    peer = attach(MIB)
    disk, offers = peer.connect(ring_order=2), OFFERS[peer.name]
    info = disk.info
    found = {name: getattr(info, name) for name in ("barrier", "persistent", "indirect", "discard")}
    assert found == {name: offers[name] for name in found}
    assert int(peer.key("multi-queue-max-queues") or 1) == offers["queues"]
    assert info.sectors == MIB << 11
    assert info.flush
    assert disk.ring_order == 2
    data = os.urandom(600_064)
    data = data[: len(data) // 512 * 512]
    disk.write(512, data)
    assert disk.read(512, len(data)) == data
    disk.flush()
    if info.barrier:
        disk.barrier(1 << 20, b"b" * 4096)
        assert disk.read(1 << 20, 4096) == b"b" * 4096
        disk.barrier()
    else:
        with pytest.raises(OSError) as refused:
            disk.barrier()
        assert refused.value.errno == errno.EOPNOTSUPP
    disk.discard(4 << 20, 1 << 20)
    assert disk.read(4 << 20, 4096) == bytes(4096)
    closed(disk, peer)
    again = peer.connect(ring_order=0, persistent=False, queues=1)
    assert again.read(512, len(data)) == data
    load = Load(again, Plan(depth=8, write_percent=50, verify="all", length=4 << 20, requests=400)).run(120)
    assert load.right and load.first_error is None
    again.close()


@pytest.mark.parametrize("abi", ["x86_64", "x86_32"])
def test_what_is_written_is_read(attach: Callable[..., Disk], abi: str) -> None:
    """Rings of both layouts and of one to sixteen pages, with and without indirect requests and persistent grants."""
    peer = attach(MIB)
    image = bytearray(1 << 20)
    chance = random.Random(1)
    first = True
    for order, indirect, persistent in ((0, False, True), (1, True, False), (2, 32, True), (4, True, True)):
        disk = peer.connect(abi=abi, ring_order=order, indirect=indirect, persistent=persistent)
        about = f"order {order}, indirect {indirect}, persistent {persistent}"
        offers = OFFERS[peer.name]
        assert disk.ring_order == order, about
        assert disk.persistent == (persistent and offers["persistent"]), about
        most = {False: 11, True: 256, 32: 32}[indirect] if offers["indirect"] else 11
        assert disk.max_segments == most, about
        assert first or disk.read(0, 1 << 20) == image, about
        for _ in range(10):
            offset = chance.randrange(0, 2000) * 512
            length = min(chance.choice([512, 4096, 45056, 65536, 199_680]), (1 << 20) - offset)
            data = os.urandom(length)
            disk.write(offset, data)
            image[offset : offset + length] = data
            assert disk.read(offset, length) == data, about
        disk.flush()
        if first:  # what was there before is not known to us
            disk.write(0, image)
            first = False
        assert disk.read(0, 1 << 20) == image, about
        assert disk.stats()["errors"] == 0, about
        closed(disk, peer)


@pytest.mark.xen_quick  # in a machine of two processors, of which Linux makes two queues
def test_as_many_queues_as_it_offers(attach: Callable[..., Disk]) -> None:
    peer = attach(MIB)
    disk = peer.connect(queues=4, ring_order=1)
    assert len(disk.queues) == OFFERS[peer.name]["queues"]
    futures = [disk.submit(Io("write", i * 4096, 4096, bytes([i]) * 4096)) for i in range(200)]
    assert [future.result(60) for future in futures] == [4096] * 200
    assert all(queue["writes"] > 0 for queue in disk.stats()["queues"])
    assert disk.read(0, 200 * 4096) == b"".join(bytes([i]) * 4096 for i in range(200))
    closed(disk, peer)


def test_closed_with_a_hundred_requests_under_way(attach: Callable[..., Disk]) -> None:
    """All are answered first; what they wrote is there for the next connection."""
    peer = attach(MIB)
    disk = peer.connect(ring_order=2)
    futures = [disk.submit(Io("write", i * 4096, 4096, bytes([i + 1]) * 4096)) for i in range(100)]
    disk.close()
    assert [future.result(0) for future in futures] == [4096] * 100
    peer.closed()
    again = peer.connect()
    assert again.read(0, 100 * 4096) == b"".join(bytes([i + 1]) * 4096 for i in range(100))
    closed(again, peer)


def test_a_disk_that_may_only_be_read(attach: Callable[..., Disk], stores: Stores) -> None:
    peer = attach(MIB, mode="r", random=True)
    if peer.name == "qemu":
        pytest.skip(QEMU_READ_ONLY)
    image = (stores.top / "disk").read_bytes()[: 1 << 20]
    disk = peer.connect()
    assert disk.info.readonly
    assert disk.read(0, 1 << 20) == image
    with pytest.raises(OSError) as refused:
        disk.write(0, bytes(512))
    assert refused.value.errno == errno.EROFS
    closed(disk, peer)


def test_a_disk_that_grows(attach: Callable[..., Disk], backend: tuple[str, Backend], stores: Stores) -> None:
    """The kernel looks at each request, ours when it is told to; QEMU is told by its monitor, which is not tried."""
    peer = attach(MIB)
    if peer.name == "qemu":
        pytest.skip("QEMU is told by its monitor (block_resize), which this one does not have")
    disk = peer.connect()
    sizes: list[int] = []
    disk.on_resize = sizes.append
    with (stores.top / "disk").open("r+b") as f:
        f.truncate(2 * MIB << 20)
    [device] = [line.partition(":")[0] for line in sh("losetup", "-j", stores.top / "disk").splitlines()]
    sh("losetup", "-c", device)
    if peer.name == "ours":
        backend[1].look_again()  # type: ignore[attr-defined]
    until(lambda: disk.read(0, 512) and sizes, 20, "the frontend is told", pause=0.2)
    assert sizes == [2 * MIB << 20] and disk.info.sectors == 2 * MIB << 11
    disk.write((2 * MIB << 20) - 4096, b"e" * 4096)
    assert disk.read((2 * MIB << 20) - 4096, 4096) == b"e" * 4096
    closed(disk, peer)


def test_a_disk_that_is_taken_away(attach: Callable[..., Disk]) -> None:
    """Asked to close, our frontend lets go in order; what comes after is an error, and none hangs."""
    peer = attach(MIB)
    disk = peer.connect()
    disk.write(0, b"w" * 4096)
    peer.detach()
    assert peer.platform.store.read(f"{peer.path}/state") is None
    with pytest.raises(OSError) as failed:
        disk.read(0, 4096)
    assert failed.value.errno == errno.EIO
    disk.close()
