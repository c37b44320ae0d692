"""What waits for a guest's buffers, for how long, and what becomes of the vif meanwhile."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.records import PACKET, RX_QUEUE
from netback.waiting import HEAD_BYTES, WAIT_BYTES, first_of, following, keep, let_go
from pvdrivers.frontends.netfront_keys import Wishes
from rings import netif
from rings.jit import kernel
from rings.vnet import CSUM_VALID

from .conftest import Guest, until
from .test_switch import nothing_came


@kernel
def _first(qa: int) -> int:
    return first_of(qa)


@kernel
def _following(qa: int, kept: int) -> int:
    return following(qa, kept)


@kernel
def _let_go(qa: int) -> None:
    let_go(qa)


@given(st.lists(st.tuples(st.booleans(), st.integers(14, 65535)), max_size=80), st.integers(0, 255))
def test_first_in_first_out_and_never_more_than_it_has(steps: list[tuple[bool, int]], salt: int) -> None:
    memory = np.full(WAIT_BYTES + 4096, 0xEE, np.uint8)
    queue, packet = np.zeros(1, RX_QUEUE), np.zeros(1, PACKET)
    qa, pa = queue.ctypes.data, packet.ctypes.data
    queue[0]["base"] = memory.ctypes.data
    model: deque[tuple[int, bytes]] = deque()
    for number, (put, size) in enumerate(steps):
        if put:
            data = np.frombuffer(bytes([number ^ salt]) * size, np.uint8)
            packet[0]["data"], packet[0]["size"], packet[0]["have"] = data.ctypes.data, size, size
            packet[0]["csum"], packet[0]["hash"], packet[0]["fragments"] = CSUM_VALID, number, 3
            if keep(qa, pa, number):
                model.append((number, data.tobytes()))
            else:  # then there is no room for it in one piece
                assert sum(HEAD_BYTES + len(one) + 63 for _, one in model) > WAIT_BYTES // 2 - 65536 - HEAD_BYTES
        elif model:
            model.popleft()
            _let_go(qa)
        kept = int(_first(qa)) if model else 0
        for index, (n, data_of) in enumerate(model):
            entry: Any = np.frombuffer((memory[kept - memory.ctypes.data :])[: PACKET.itemsize].tobytes(), PACKET)[0]
            at = int(entry["data"]) - memory.ctypes.data
            assert memory[at : at + len(data_of)].tobytes() == data_of
            assert (int(entry["hash"]), int(entry["until"]), int(entry["size"])) == (n, n, len(data_of))
            assert (int(entry["have"]), int(entry["fragments"])) == (len(data_of), 0)
            if index + 1 < len(model):
                kept = int(_following(qa, kept))
        assert int(queue[0]["count"]) == len(model)
        assert (memory[WAIT_BYTES:] == 0xEE).all()


def carrier(guest: Guest) -> bytes | None:
    return guest.net.dom0.store.read(f"{guest.backend}/carrier")


def fill(a: Guest, b: Guest, more: int = 0) -> bytes:
    """All but one of its buffers, and then some that wait."""
    frame = a.frame(b, os.urandom(4096 * 15 - 14))
    for _ in range(17 + more):
        a.vif.send(frame)
    until(lambda: a.counted("sent") >= 17 + more)
    return frame


daemon_serves = pytest.mark.jit_only("a real daemon serves")


@daemon_serves
@pytest.mark.parametrize("wishes", [Wishes(), Wishes(split=False), Wishes(notify=False)])
def test_what_waits_comes_as_soon_as_there_are_buffers(net: Any, wishes: Wishes) -> None:
    """In order, whatever its size; with events for both rings, with one, and with none that says so."""
    a, b = net.guest(), net.guest(wishes=wishes, be={"rx_drain_timeout_msecs": 5000})
    frames = [a.frame(b, os.urandom(size)) for size in (3, 4083, 60000, 1, 40000, 8178) * 3]
    first = fill(a, b)
    for frame in frames:
        a.vif.send(frame)
    got = []
    while len(got) < 17 + len(frames):
        got.append(b.vif.receive(5))
        time.sleep(0.001)
    assert got == [first] * 17 + frames
    assert b.counted("dropped") == b.counted("expired") == 0


@daemon_serves
@pytest.mark.parametrize(
    ("wishes", "be"), [(Wishes(), {"rx_drain_timeout_msecs": 200}), (Wishes(notify=False), {})]
)
def test_what_waits_too_long_is_dropped(net: Any, wishes: Wishes, be: dict[str, Any]) -> None:
    """10 s, or 30 ms for a guest that does not say when it posts a buffer."""
    a, b = net.guest(), net.guest(wishes=wishes, be=be)
    frame = fill(a, b, 5)
    until(lambda: b.counted("expired") == 5)
    assert [b.vif.receive(5) for _ in range(17)] == [frame] * 17
    nothing_came(b)
    a.vif.send(a.frame(b, b"on time"))
    assert b.vif.receive(5) == a.frame(b, b"on time")


@daemon_serves
def test_a_guest_without_buffers_for_too_long_has_no_carrier(net: Any) -> None:
    """XSA-392 (CVE-2021-28714): one slot that stays free does not keep the time from running out."""
    be = {"rx_stall_timeout_msecs": 400, "rx_drain_timeout_msecs": 100}
    a, b, c = net.guest(), net.guest(be=be), net.guest()
    assert carrier(b) == b"1" and b.vif.carrier
    frame = fill(a, b, 1)
    until(lambda: carrier(b) == b"0")
    until(lambda: not b.vif.carrier)
    assert b.counted("expired") == 1
    before = b.counted("dropped")
    for _ in range(5):
        a.vif.send(frame)
    until(lambda: b.counted("dropped") == before + 5)
    b.vif.send(b.frame(c, b"it may send"))
    assert c.vif.receive(5) == b.frame(c, b"it may send")
    for _ in range(17):
        assert b.vif.receive(5) == frame
    until(lambda: carrier(b) == b"1" and b.vif.carrier)
    a.vif.send(frame)
    assert b.vif.receive(5) == frame


@daemon_serves
def test_a_guest_that_takes_what_comes_does_not_stall(net: Any) -> None:
    """One packet was too large for the buffers that it had, and has expired; each that came since was delivered."""
    be = {"rx_stall_timeout_msecs": 1500, "rx_drain_timeout_msecs": 100}
    a, b = net.guest(), net.guest(be=be)
    small = a.frame(b, b"fits")
    for _ in range(246):
        a.vif.send(small)
    until(lambda: b.counted("received") == 246)
    a.vif.send(a.frame(b, bytes(60000)))
    until(lambda: b.counted("expired") == 1)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        a.vif.send(small)
        assert b.vif.receive(5) == small
        time.sleep(0.005)
    assert b.counted("dropped") == 0 and carrier(b) == b"1" and b.vif.carrier


@daemon_serves
def test_a_guest_that_never_says_when_it_posts_never_stalls(net: Any) -> None:
    a, b = net.guest(), net.guest(wishes=Wishes(notify=False), be={"rx_stall_timeout_msecs": 100})
    frame = fill(a, b, 3)
    time.sleep(0.3)
    assert carrier(b) == b"1"
    assert b.vif.receive(5) == frame


@daemon_serves
def test_a_sender_without_a_page_for_what_waits(net: Any) -> None:
    """XSA-362: the copy of what is to wait fails: its sender is told, and the receiver gets the others."""
    from .test_hostile import NO_GREF, page_of, put

    a, liar, b = net.guest(), net.guest(), net.guest()
    frame = fill(a, b, 1)
    head = liar.frame(b, b"h" * 2000)
    good, good_id = page_of(liar, head)
    rest = [(NO_GREF, 0, netif.TXF_more_data if k else 0, 0xFF00 + k, 3000) for k in range(9, -1, -1)]
    put(liar, (good, 0, netif.TXF_more_data, good_id, len(head) + 30000), *rest)
    until(lambda: liar.counted("refused") == 1)
    a.vif.send(a.frame(b, b"behind it"))
    assert [b.vif.receive(5) for _ in range(19)] == [frame] * 18 + [a.frame(b, b"behind it")]
