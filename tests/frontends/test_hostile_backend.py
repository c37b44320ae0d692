"""A backend that lies: whatever it does, callers get EIO with a message, and the process goes on."""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvdrivers.errors import PvError
from pvdrivers.frontends.blkfront import Io
from pvdrivers.frontends.load import Load, Plan
from pvdrivers.xenbus import XenbusState
from rings import blkif
from tests.hostile_backend import CONNECTED, Answer, Request

Lie = Callable[[Request, Answer], list[Answer]]

LIES: dict[str, tuple[Lie, str]] = {
    "id out of range": (lambda r, a: [(0xFFFF, a[1], 0)], "never used"),
    "id with high bits": (lambda r, a: [(a[0] | 1 << 63, a[1], 0)], "not in flight"),
    "id of nobody": (lambda r, a: [(a[0] + 1, a[1], 0)], "not in flight"),
    "id of an earlier request": (lambda r, a: [(a[0] - (1 << 32), a[1], 0)], "not in flight"),
    "answered twice": (lambda r, a: [a, a], "beyond|not in flight"),
    "wrong operation": (lambda r, a: [(a[0], blkif.OP_FLUSH_DISKCACHE, 0)], "wrong operation"),
    "operation 6 for an indirect request": (lambda r, a: [(a[0], blkif.OP_INDIRECT, 0)], "wrong operation"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("abi", ["x86_64", "x86_32"])
def test_a_lie_puts_the_disk_in_error(setup: Any, lie: str, abi: str) -> None:
    backend = setup.serve()
    disk = setup.connect(abi=abi)
    disk.write(0, bytes(4096))
    backend.answer = LIES[lie][0]
    with pytest.raises(OSError) as failed:
        disk.write(0, bytes(4096))
        disk.write(0, bytes(4096))
    assert failed.value.errno == errno.EIO
    assert "domain 0, device vbd xvda: " in disk.failure
    assert any(word in disk.failure for word in LIES[lie][1].split("|")), disk.failure
    with pytest.raises(OSError):
        disk.read(0, 512)
    assert disk.wait_state(lambda: disk.state is XenbusState.Closed, 5)
    assert setup.guest.store.read(f"{disk.path}/state") == b"6"


def test_a_page_that_is_still_mapped(setup: Any) -> None:
    backend = setup.serve()
    disk = setup.connect()
    backend.keep_mapped = True
    with pytest.raises(OSError):
        disk.write(0, bytes(4096))
    assert "still mapped" in disk.failure
    disk.close(timeout=0.1)


@pytest.mark.parametrize("producer", [1, 33, 1 << 31, 0xFFFFFFFF])
def test_a_producer_index_from_nowhere(setup: Any, producer: int) -> None:
    backend = setup.serve()
    disk = setup.connect()
    backend.serving = False
    ring = backend.rings[0]
    ctypes.c_uint32.from_address(ring.mapping.address + 8).value = producer
    backend._events.notify(ring.port)
    assert disk.wait_state(lambda: disk.failure, 5)
    assert "beyond" in disk.failure


def test_a_lie_ends_a_load(setup: Any) -> None:
    backend = setup.serve()
    disk = setup.connect(ring_order=1)
    load = Load(disk, Plan(depth=8, write_percent=50, verify="all"))
    load.start()
    time.sleep(0.3)
    backend.answer = LIES["wrong operation"][0]
    with pytest.raises(PvError, match="wrong operation"):
        load.wait(20)


def test_the_other_disks_of_a_guest_go_on(make_setup: Callable[[], Any]) -> None:
    bad, good = make_setup(), make_setup()
    liar = bad.serve()
    bad.connect()
    good.connect()
    liar.answer = LIES["wrong operation"][0]
    with pytest.raises(OSError):
        bad.disk.read(0, 512)
    good.disk.write(0, b"a" * 512)
    assert good.disk.read(0, 512) == b"a" * 512


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"sectors": "many"}, "key sectors"),
        ({"sectors": 1 << 60}, "key sectors"),
        ({"sectors": "-1"}, "key sectors"),
        ({"sector_size": 0}, "key sector-size"),
        ({"sector_size": 3000}, "key sector-size"),
        ({"sector_size": 1 << 20}, "key sector-size"),
        ({"feature_max_indirect_segments": 1 << 40}, "key feature-max-indirect-segments"),
        ({"max_ring_page_order": "x" * 100}, "key max-ring-page-order"),
        ({"multi_queue_max_queues": 1 << 40}, "key multi-queue-max-queues"),
        ({"info": "\udcff"}, "key info"),
    ],
)
def test_keys_that_no_honest_backend_writes(setup: Any, keys: dict[str, Any], why: str) -> None:
    if keys.get("info"):
        keys = {"info": b"\xff\xfe"}
    backend = setup.serve(**keys)
    with pytest.raises(PvError, match=why):
        setup.connect(backend)


def test_a_state_that_is_none(setup: Any) -> None:
    disk = setup.connect()
    setup.dom0.store.write(f"{setup.path}/state", "forty")
    assert disk.wait_state(lambda: disk.failure, 5)
    assert "forty" in disk.failure


def test_a_storm_of_events_and_watches(setup: Any) -> None:
    backend = setup.serve()
    disk = setup.connect()
    for _ in range(2000):
        backend._events.notify(backend.rings[0].port)
    for _ in range(200):
        backend.say(CONNECTED, sectors=2048)
    disk.write(0, b"q" * 4096)
    assert disk.read(0, 4096) == b"q" * 4096
    assert disk.state is XenbusState.Connected


def test_bounce_pages_hold_nothing_else(setup: Any) -> None:
    """What an untrusted backend finds in a granted page is the data of this request, and zeroes."""
    backend = setup.serve(feature_max_indirect_segments=64)
    seen: list[bytes] = []

    def look(request: Request, honest: Answer) -> list[Answer]:
        return [honest]

    execute = backend.execute

    def peek(ring: Any, request: Request) -> int:
        seen.extend(backend.copy_out(gref) for gref, _, _ in request.segments)
        return execute(ring, request)

    backend.execute, backend.answer = peek, look  # type: ignore[method-assign]
    disk = setup.connect(trusted=False)
    disk.write(0, b"S" * 65536)
    seen.clear()
    disk.write(0, b"T" * 512)
    disk.read(65536, 65536)
    assert seen[0] == b"T" * 512 + bytes(4096 - 512)
    assert all(page == bytes(4096) for page in seen[1:])


@settings(max_examples=25)
@given(raw=st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=8), producer=st.integers(0, 40))
@pytest.mark.fuzz
def test_any_bytes_on_the_ring(make_setup_once: Any, raw: list[bytes], producer: int) -> None:
    """Any responses and any index: at most this disk is in error, and then a new one can be connected."""
    setup = make_setup_once()
    backend = setup.serve()
    disk = setup.connect()
    backend.serving = False
    futures = [disk.submit(Io("read", i * 4096, 4096, bytearray(4096))) for i in range(4)]
    ring = backend.rings[0]
    for i, message in enumerate(raw):
        ctypes.memmove(ring.mapping.address + 64 + 112 * i, message, 16)
    ctypes.c_uint32.from_address(ring.mapping.address + 8).value = producer
    backend._events.notify(ring.port)
    beyond = producer > len(futures)  # more answers than there were requests
    disk.wait_state(lambda: disk.failure, 10 if beyond else 0.05)
    assert disk.failure or not beyond
    setup.end()
    assert all(future.done() for future in futures)
    for future in futures:
        assert future.exception() is None or isinstance(future.exception(), OSError)
