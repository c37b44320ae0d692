"""blkfront against an honest backend in plain Python: every operation, both ABIs, every way that data can go."""

from __future__ import annotations

import errno
import os
import random
import time
from typing import Any

import pytest

from pvdrivers.frontends.blkfront import Io
from rings import blkif


@pytest.mark.parametrize("abi", ["x86_64", "x86_32"])
@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("indirect", [0, 32])
@pytest.mark.parametrize("grants", ["each", "persistent", "untrusted"])
def test_what_is_written_is_read(setup: Any, abi: str, order: int, indirect: int, grants: str) -> None:
    backend = setup.serve(feature_persistent=int(grants == "persistent"), feature_max_indirect_segments=indirect)
    disk = setup.connect(abi=abi, ring_order=order, trusted=grants != "untrusted")
    assert disk.info.size == 1 << 20
    assert disk.persistent == (grants == "persistent")
    image = bytearray(1 << 20)
    chance = random.Random(1)
    for _ in range(12):
        offset = chance.randrange(0, 2000) * 512
        length = min(chance.choice([512, 4096, 45056, 65536, 200000 // 512 * 512]), (1 << 20) - offset)
        data = os.urandom(length)
        disk.write(offset, data)
        image[offset : offset + length] = data
        assert disk.read(offset, length) == data
    disk.flush()
    assert disk.read(0, 1 << 20) == image
    assert backend.data == image
    assert disk.stats()["errors"] == 0
    assert any(r.indirect for r in backend.requests) == bool(indirect)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_guest_buffer_is_not_copied_unless_told_to(setup: Any, trusted: bool) -> None:
    setup.serve(feature_max_indirect_segments=32)
    disk = setup.connect(trusted=trusted)
    buffer = disk.buffer(65536)
    data = os.urandom(65536 - 512)
    buffer.view[512:] = data  # it begins within a page
    assert disk.submit(Io("write", 1024, len(data), buffer, 512)).result(10) == len(data)
    assert setup.backend.data[1024 : 1024 + len(data)] == data
    buffer.view[:] = bytes(65536)
    disk.submit(Io("read", 1024, len(data), buffer, 512)).result(10)
    assert buffer.view[512:] == data
    assert bytes(buffer.view[:512]) == bytes(512)
    assert (disk.stats()["bounced_pages"] == 0) == trusted
    buffer.free()


def test_several_queues_of_several_pages(setup: Any) -> None:
    backend = setup.serve(multi_queue_max_queues=2)
    disk = setup.connect(queues=4, ring_order=1)
    assert len(disk.queues) == 2
    futures = [disk.submit(Io("write", i * 4096, 4096, bytes([i]) * 4096)) for i in range(200)]
    assert [future.result(10) for future in futures] == [4096] * 200
    assert {r.queue for r in backend.requests} == {0, 1}
    assert all(backend.data[i * 4096 : (i + 1) * 4096] == bytes([i]) * 4096 for i in range(200))
    assert backend.front_keys["multi-queue-num-queues"] == "2"
    assert setup.dom0.store.read(f"{backend.front}/ring-ref") is None


def test_one_queue_of_one_page_has_flat_keys(setup: Any) -> None:
    backend = setup.serve()
    setup.guest.store.write(f"/local/domain/{setup.domain.domid}/device/vbd/51712/ring-ref0", "77")
    setup.connect()
    names = setup.dom0.store.ls(backend.front)
    assert {"ring-ref", "event-channel", "protocol"} <= set(names)
    assert not {"ring-ref0", "ring-page-order", "multi-queue-num-queues", "queue-0"} & set(names)


def test_flush_barrier_and_discard(setup: Any) -> None:
    backend = setup.serve()
    disk = setup.connect()
    disk.write(0, b"x" * 8192)
    disk.flush()
    disk.barrier(512, b"y" * 512)
    disk.barrier()
    disk.discard(0, 512)
    disk.discard(4096, 4096, secure=True)
    assert disk.read(0, 8192) == bytes(512) + b"y" * 512 + b"x" * 3072 + bytes(4096)
    ops = [r.op for r in backend.requests]
    assert ops.count(blkif.OP_FLUSH_DISKCACHE) == 1
    assert ops.count(blkif.OP_WRITE_BARRIER) == 2
    assert [r.flag for r in backend.requests if r.op == blkif.OP_DISCARD] == [0, blkif.DISCARD_SECURE]
    with pytest.raises(ValueError, match="carries"):
        disk.barrier(0, bytes(45056 + 512))


def test_what_a_backend_does_not_have(setup: Any) -> None:
    setup.serve(feature_flush_cache=0, feature_barrier=0, feature_discard=0, discard_secure=0)
    disk = setup.connect()
    disk.flush()  # no cache, nothing to do
    for attempt in (disk.barrier, lambda: disk.discard(0, 512), lambda: disk.discard(0, 512, secure=True)):
        with pytest.raises(OSError) as refused:
            attempt()
        assert refused.value.errno == errno.EOPNOTSUPP
    assert setup.backend.requests == []


def test_a_feature_is_revoked(setup: Any) -> None:
    backend = setup.serve()
    backend.answer = lambda request, honest: [(honest[0], honest[1], blkif.RSP_EOPNOTSUPP)]
    disk = setup.connect()
    with pytest.raises(OSError) as refused:
        disk.discard(0, 512)
    assert refused.value.errno == errno.EOPNOTSUPP
    assert not disk.info.discard
    assert disk.info.flush


def test_read_only_and_removable(setup: Any) -> None:
    setup.serve(info=blkif.VDISK_READONLY | blkif.VDISK_CDROM | blkif.VDISK_REMOVABLE)
    disk = setup.connect()
    assert (disk.info.readonly, disk.info.cdrom, disk.info.removable) == (True, True, True)
    with pytest.raises(OSError) as refused:
        disk.write(0, bytes(512))
    assert refused.value.errno == errno.EROFS
    assert disk.read(0, 512) == bytes(512)


def test_large_sectors_are_counted_in_512_bytes(setup: Any) -> None:
    backend = setup.serve(sector_size=4096, physical_sector_size=4096)
    disk = setup.connect()
    assert (disk.info.sectors, disk.info.size) == (2048, 1 << 20)
    disk.write(8192, b"z" * 65536)
    assert backend.data[8192 : 8192 + 65536] == b"z" * 65536
    assert all(r.sector % 8 == 0 for r in backend.requests)
    with pytest.raises(ValueError, match="multiples of 4096"):
        disk.read(512, 4096)


def test_a_range_that_is_not_on_the_disk(setup: Any) -> None:
    disk = setup.connect()
    for offset, length in ((1 << 20, 512), (-512, 512), (0, (1 << 20) + 512), (1 << 62, 512), (100, 512), (0, 100)):
        with pytest.raises(ValueError):
            disk.read(offset, length)
    assert disk.read(1 << 20, 0) == b""


def test_an_error_is_eio_and_nothing_more(setup: Any) -> None:
    backend = setup.serve()
    backend.answer = lambda request, honest: [(*honest[:2], blkif.RSP_ERROR if request.sector == 88 else 0)]
    disk = setup.connect()
    with pytest.raises(OSError) as refused:
        disk.write(0, bytes(65536))
    assert refused.value.errno == errno.EIO
    disk.write(8192, bytes(512))
    assert not disk.failure


def test_resize(setup: Any) -> None:
    backend = setup.serve()
    disk = setup.connect()
    seen: list[int] = []
    disk.on_resize = seen.append
    backend.resize(2 << 20)
    assert disk.wait_state(lambda: disk.info.size == 2 << 20, 5)
    disk.write((2 << 20) - 512, b"e" * 512)
    assert seen == [2 << 20]


def test_orderly_close(setup: Any) -> None:
    backend = setup.serve(feature_persistent=1)
    disk = setup.connect()
    futures = [disk.submit(Io("write", i * 4096, 4096, bytes(4096))) for i in range(100)]
    disk.close()
    assert [future.result(0) for future in futures] == [4096] * 100
    assert backend.front_state() == 6
    assert disk.stats()["stuck_grants"] == 0
    with pytest.raises(OSError):
        disk.read(0, 512)
    disk.close()


def test_a_platform_that_grants_pages_once_and_for_all(setup: Any) -> None:
    """As gntalloc does: data goes through pages that stay granted, whether or not the backend keeps them mapped."""
    backend = setup.serve(feature_max_indirect_segments=32)
    setup.guest.pages.dynamic = False
    disk = setup.connect()
    assert not disk.persistent
    data = os.urandom(65536)
    buffer = disk.buffer(65536)
    buffer.view[:] = data
    disk.submit(Io("write", 0, 65536, buffer)).result(10)
    assert disk.read(0, 65536) == data
    first = [gref for gref, _, _ in backend.requests[0].segments]
    disk.read(0, 65536)
    assert [gref for gref, _, _ in backend.requests[-1].segments] == first
    assert disk.stats()["granted_pages"] == 0
    buffer.free()


def test_what_does_not_fit_waits(setup: Any) -> None:
    """More requests than the ring has slots, and a caller for each."""
    backend = setup.serve()
    disk = setup.connect()
    backend.serving = False
    futures = [disk.submit(Io("write", i * 512, 512, bytes([i % 251]) * 512)) for i in range(300)]
    deadline = time.monotonic() + 10
    while disk.stats()["in_flight"] < 32:  # they wait for the ring if it is not in use yet
        assert time.monotonic() < deadline
    assert disk.stats()["in_flight"] == 32
    assert not any(future.done() for future in futures)
    backend.serving = True
    assert [future.result(10) for future in futures] == [512] * 300
    assert backend.data[: 300 * 512] == b"".join(bytes([i % 251]) * 512 for i in range(300))


def test_many_threads(setup: Any) -> None:
    import threading

    setup.serve(multi_queue_max_queues=2)
    disk = setup.connect(queues=2, ring_order=1)
    wrong: list[int] = []

    def work(me: int) -> None:
        for i in range(40):
            data = bytes([me * 16 + i % 16]) * 4096
            disk.write(me * 65536 + i % 16 * 4096, data)
            if disk.read(me * 65536 + i % 16 * 4096, 4096) != data:
                wrong.append(me)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert disk.stats()["reads"] == disk.stats()["writes"] == 320
