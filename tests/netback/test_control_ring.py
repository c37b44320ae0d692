"""The control ring by a real daemon: a guest's hash steers what it gets, live, and outlives the daemon."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from typing import Any

import pytest

from netback.waiting import HEAD_BYTES, WAIT_BYTES
from pvdrivers.frontends.netfront import CSUM_BLANK, Frame
from pvdrivers.frontends.netfront_keys import Wishes
from rings import netif

from .conftest import Guest, until
from .control_bed import KEY, ipv4, ipv6
from .naive_control import Vif

pytestmark = pytest.mark.jit_only("a real daemon serves")


def flow(a: Guest, b: Guest, number: int, *, tcp: bool = True, six: bool = False) -> bytes:
    """A frame of one of many flows."""
    make = ipv6 if six else ipv4
    frame = make(6 if tcp else 17, ports=number.to_bytes(4, "big"))
    return b.mac + a.mac + frame[12:]


def came(b: Guest, count: int = 1) -> list[tuple[int, Frame]]:
    """So many frames, and whatever else has come, each with its queue. Fewer if they do not come."""
    got: list[tuple[int, Frame]] = []
    deadline = time.monotonic() + 10
    while True:
        before = len(got)
        for queue in range(len(b.vif.queues)):
            try:
                got += [(queue, frame) for frame in b.vif.receive_all(64, 0.05, queue=queue)]
            except TimeoutError:
                pass
        if len(got) == before and (len(got) >= count or time.monotonic() > deadline):
            return got


def hash_of(types: int, frame: bytes) -> tuple[int, int] | None:
    """What the naive twin says of a frame of flow()."""
    if frame[12:14] not in (b"\x86\xdd", b"\x08\0"):
        return None
    six = frame[12:14] == b"\x86\xdd"
    protocol, l4 = (frame[20], 54) if six else (frame[23], 34)
    twin = Vif(1, types=types, key=KEY)
    return twin.hash(6 if six else 4, frame[14:], frame[l4 : l4 + 4] if protocol == 6 else None)


def test_a_hash_steers_and_is_told(net: Any) -> None:
    a, b = net.guest(), net.guest(queues=4)
    mapping = [3, 1, 2, 0, 1, 1, 1]
    b.vif.set_hash(KEY, mapping=mapping)
    frames = [flow(a, b, n, tcp=n % 3 > 0, six=n % 2 > 0) for n in range(60)] + [a.frame(b, b"no IP at all")]
    a.vif.send_all([Frame(frame) for frame in frames])
    got = came(b, len(frames))
    assert sorted(frame.data for _, frame in got) == sorted(frames)
    for queue, frame in got:
        said = hash_of(15, frame.data)
        assert (frame.hash_type, frame.hash) == (said or (0, 0))
        assert queue == mapping[frame.hash % 7]
    assert {queue for queue, _ in got} == {0, 1, 2, 3}


def test_types_and_no_mapping_and_the_end_of_it(net: Any) -> None:
    a, b = net.guest(), net.guest(queues=3)
    frames = [flow(a, b, n, six=n % 2 > 0) for n in range(20)]
    b.vif.set_hash(KEY, types=netif.HASH_IPV6_TCP)
    a.vif.send_all([Frame(frame) for frame in frames])
    for queue, frame in came(b, 20):
        said = hash_of(netif.HASH_IPV6_TCP, frame.data)
        assert (frame.hash_type, frame.hash) == (said or (0, 0))
        assert queue == frame.hash % 3
    b.vif.clear_hash()
    a.vif.send_all([Frame(frame) for frame in frames])
    got = came(b, 20)
    assert len(got) == 20
    assert not any(frame.hash_type for _, frame in got)


def test_with_segments_and_what_a_sender_says(net: Any) -> None:
    """An EXTRA_HASH beside an EXTRA_GSO, both ways. It is passed on to who wants hashes and has none of its own."""
    a, b, c = net.guest(), net.guest(), net.guest()
    b.vif.set_hash(KEY, types=netif.HASH_IPV6)
    big = Frame(flow(a, b, 7) + os.urandom(30000), CSUM_BLANK, 1448, netif.GSO_TCPV4, netif.HASH_IPV4_TCP, 0xCAFEF00D)
    a.vif.send_all([big])
    assert b.vif.receive_all(1, 5) == [big]
    a.vif.send_all([Frame(a.frame(c), hash_type=netif.HASH_IPV4, hash=1)])
    assert c.vif.receive_all(1, 5) == [Frame(a.frame(c))]
    assert a.vif.stats()["tx_errors"] == 0


def test_what_the_backend_refuses(net: Any) -> None:
    a, b = net.guest(), net.guest(queues=2)
    b.vif.set_hash(KEY, mapping=[1])
    for number, what in (
        (errno.EOVERFLOW, {"key": bytes(41)}),
        (errno.EINVAL, {"key": KEY, "mapping": [0] * 129}),
        (errno.EINVAL, {"key": KEY, "mapping": [0, 2]}),
        (errno.EINVAL, {"key": KEY, "types": 16}),
    ):
        with pytest.raises(OSError) as caught:
            b.vif.set_hash(**what)  # type: ignore[arg-type]
        assert caught.value.errno == number
    a.vif.send(flow(a, b, 1))
    queue, frame = came(b)[0]
    assert (queue, frame.hash_type) == (1, netif.HASH_IPV4_TCP), "the one before is set"
    with pytest.raises(OSError, match="no control ring"):
        net.guest(wishes=Wishes(control=False)).vif.set_hash(KEY)


def test_under_traffic_it_takes_effect_with_the_next_packet(net: Any) -> None:
    """Every packet comes by the old hash or by the new one, whole; after set_hash() returns by the new one alone."""
    a, b = net.guest(), net.guest(queues=2)
    stop = threading.Event()

    def send() -> None:
        n = 0
        while not stop.is_set():
            a.vif.send_all([Frame(flow(a, b, n + k)) for k in range(32)])
            n += 32

    def told(key: bytes, to: int, frame: Frame) -> tuple[int, int, int]:
        return (to, *(hash_of(15, frame.data) or (0, 0))) if key == KEY else (to, netif.HASH_IPV4_TCP, 0)

    old = 256 + WAIT_BYTES // (HEAD_BYTES + 64)  # so many may be on each ring from before, and wait for it
    before, now = (KEY, 0), (KEY, 0)
    b.vif.set_hash(KEY, mapping=[0])
    thread = threading.Thread(target=send)
    thread.start()
    try:
        for round in range(6):
            before, now = now, (KEY, 1) if round % 2 else (bytes(40), 0)
            b.vif.set_hash(now[0], mapping=[now[1]] * 128)
            taken = [0, 0]
            while taken[now[1]] < old + 100:
                for queue in (0, 1):
                    with contextlib.suppress(TimeoutError):
                        for frame in b.vif.receive_all(64, 0.001, queue=queue):
                            allowed = [told(*now, frame)]
                            if taken[queue] < old:
                                # While it is being set there are no types, and the backend steers as it likes.
                                allowed += [told(*before, frame), (0, 0, 0), (1, 0, 0)]
                            assert (queue, frame.hash_type, frame.hash) in allowed, (round, taken)
                            taken[queue] += 1
    finally:
        stop.set()
        thread.join()


def test_a_killed_daemon_leaves_the_hash_to_the_next(net: Any) -> None:
    a, b = net.guest(), net.guest(queues=2)
    b.vif.set_hash(KEY, mapping=[1])
    net.daemon.kill()
    net.daemon.start()

    def heard() -> bool:
        a.vif.send(flow(a, b, 5))
        return bool(came(b, 0))

    until(heard)
    came(b, 0)  # of those before the last, what was late
    a.vif.send(flow(a, b, 6))
    assert [(queue, frame.hash_type) for queue, frame in came(b)] == [(1, netif.HASH_IPV4_TCP)]
    b.vif.set_hash(KEY, mapping=[0])
    a.vif.send(flow(a, b, 7))
    assert [queue for queue, _ in came(b)] == [0]
    assert b.vif.connections == 1


def test_a_new_connection_begins_without_and_netfront_sets_it_again(net: Any) -> None:
    a, b = net.guest(), net.guest(queues=2)
    b.vif.set_hash(KEY, mapping=[1])
    path = net.run_dir / "hash" / b.name
    assert path.exists()
    net.dom0.store.write(f"{b.backend}/state", "5")  # the backend closes
    until(lambda: b.vif.connections == 2 and b.vif.state == 4)
    a.vif.send(flow(a, b, 1))
    assert [queue for queue, _ in came(b)] == [1]
    b.end()
    net.guests.remove(b)
    assert not path.exists()
