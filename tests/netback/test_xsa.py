"""Classes of the security list that need a guest that goes on lying while it is served. The others are named where they
are tested:

    XSA-39 -155 -423 -432 -448             test_request.py, test_hostile.py
    XSA-362 -367 -374                      test_hostile.py, test_switch.py, test_waiting.py
    XSA-392                                test_switch.py, test_waiting.py, and here
    XSA-391 -396 -405 -465                 test_xsa_front.py: they are about the frontend
    XSA-424                                here
    num-queues 0                           test_hostile.py
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.frontends.netfront import Frame
from rings import netif

from .conftest import until
from .test_hostile import page_of, put, talk

pytestmark = pytest.mark.jit_only("a real daemon serves")


def test_xsa_155_headers_and_requests_that_change_while_they_are_read(net: Any) -> None:
    """CVE-2015-8550: a packet is sent to where its header says, once; what arrives has that header."""
    liar, b, c = net.guest(), net.guest(), net.guest()
    queue = liar.vif.queues[0]
    over = threading.Event()
    frames = [liar.frame(to, bytes(to.mac) * 100) for to in (b, c)]
    gref, id = page_of(liar, frames[0])
    at = int(queue.record[0]["tx_pages"]) + id * 4096
    size_at = int(queue._keep["tx_end"][0]["slots"]) + 8 + 2

    def flip() -> None:
        while not over.is_set():
            for frame in frames:
                ctypes.memmove(at, frame, len(frame))
                for k in range(0, 256, 5):
                    ctypes.c_uint16.from_address(size_at + k * 12).value ^= 0x100

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        got = 0
        queue._keep["in_flight"][:] = 1
        for _ in range(300):
            queue._keep["in_flight"][:] = 1
            put(liar, (gref, 0, 0, id, len(frames[0])))
            for to in (b, c):
                try:
                    while True:
                        for frame in to.vif.receive_all(64, 0.001):
                            assert frame.data[:6] == to.mac, "what was looked at is not what was sent"
                            got += 1
                except TimeoutError:
                    pass
    finally:
        over.set()
        thread.join()
    assert got > 10
    talk(b, c)


@pytest.mark.parametrize("which", ["tx_port", "rx_port"])
def test_xsa_332_a_storm_of_events(net: Any, which: str) -> None:
    """CVE-2020-27673: on either channel; it is named, and the neighbours do not notice."""
    liar, a, b = net.guest(), net.guest(), net.guest()
    queue = liar.vif.queues[0]
    port, over = int(queue.record[0][which]), threading.Event()

    def storm() -> None:
        while not over.is_set():
            for _ in range(100):
                queue._events.notify(port)  # type: ignore[union-attr]
            time.sleep(0.001)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        until(lambda: f"{liar.name}: its guest sends events with nothing behind them" in net.daemon.log.read_text(), 30)
        for _ in range(20):
            talk(a, b)
    finally:
        over.set()
        thread.join()
    liar.vif.send(liar.frame(a, b"it may send"))
    assert a.vif.receive(5) == liar.frame(a, b"it may send")


def test_xsa_349_a_storm_of_watches(net: Any) -> None:
    """CVE-2020-29568: the key that is watched while it is connected is written without end."""
    liar, a, b = net.guest(), net.guest(), net.guest()
    path = f"/local/domain/{liar.domain.domid}/device/vif/0/{netif.KEY_REQUEST_MCAST}"
    for k in range(1500):
        liar.platform.store.write(path, k % 2)
        if k % 300 == 0:
            talk(a, b)
    liar.platform.store.write(path, "nonsense" * 100)
    talk(a, b)
    talk(liar, a)
    assert "our own fault" not in net.daemon.log.read_text()


def memory_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_xsa_392_memory_is_bounded_whatever_a_receiver_does(net: Any) -> None:
    """CVE-2021-28715: it takes nothing, for as long as somebody sends to it; and posts one buffer now and then."""
    a, b = net.guest(), net.guest()
    frame = a.frame(b, bytes(60000))
    for _ in range(100):
        a.vif.send(frame)
    until(lambda: a.counted("sent") == 100)
    before = memory_of(net.daemon.popen.pid)
    for k in range(2000):
        a.vif.send(frame if k % 2 else a.frame(b, bytes(50)))
        if k % 100 == 0:
            b.vif.receive(5)
    until(lambda: a.counted("sent") == 2100)
    assert memory_of(net.daemon.popen.pid) - before < 1 << 20
    assert b.counted("dropped") > 1000


def test_xsa_424_packets_are_dropped_while_their_receivers_send(net: Any) -> None:
    """CVE-2022-42328, -42329: what could not be delivered was freed under a lock that the free took, and the host stood
    still. Guests that take nothing fill each other up, through all that drops: no room, no time, no carrier."""
    a, b = (net.guest(queues=2, be={"rx_drain_timeout_msecs": 20}) for _ in range(2))
    c, d = net.guest(), net.guest()
    frames = [Frame(one.frame(to, bytes(n))) for one, to in ((a, b), (b, a)) for n in (60000, 46)]
    over = threading.Event()
    failed: list[BaseException] = []

    def send(guest: Any, mine: list[Frame], queue: int) -> None:
        try:
            while not over.is_set():
                guest.vif.send_all(mine * 8, timeout=10, queue=queue)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=send, args=(guest, mine, queue)) for queue in (0, 1)
               for guest, mine in ((a, frames[:2]), (b, frames[2:]))]  # fmt: skip
    for thread in threads:
        thread.start()
    try:
        for key in ("down", "up", "down", "up"):
            net.dom0.store.write(f"{b.backend}/link", key)
            for _ in range(50):
                talk(c, d)
        for kind in ("dropped", "expired", "no carrier"):
            until(lambda k=kind: a.counted(k) + b.counted(k) > 0)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failed, "a sender waits for nobody who receives"
    for guest, other in ((a, b), (b, a)):
        until(lambda g=guest, o=other: _hears(g, o))


def _hears(a: Any, b: Any) -> bool:
    for queue in (0, 1):
        try:
            while True:
                b.vif.receive_all(64, 0.01, queue=queue)
        except TimeoutError:
            pass
    a.vif.send(a.frame(b, b"still here"))
    for queue in (0, 1):
        try:
            return bool(b.vif.receive(0.2, queue=queue) == a.frame(b, b"still here"))
        except TimeoutError:
            pass
    return False


def test_xsa_403_a_granted_page_holds_nothing_but_its_packet(net: Any) -> None:
    """CVE-2022-26365: the frontend's side, for a backend that is not trusted."""
    a, b = net.guest(trusted=False), net.guest()
    queue = a.vif.queues[0]
    for size in (4096, 60, 4096, 20, 3000):
        a.vif.send(a.frame(b, os.urandom(size - 14)))
        assert len(b.vif.receive(5)) == size
    q = queue.record[0]
    pages = [ctypes.string_at(int(q["tx_pages"]) + k * 4096, 4096) for k in range(256)]
    used = [one for one in pages if one.strip(b"\0")]
    assert used and all(one.startswith(b.mac + a.mac) for one in used)
    last = max(len(one.rstrip(b"\0")) for one in used if len(one.rstrip(b"\0")) <= 3000)
    assert last <= 3000 and sum(len(one.rstrip(b"\0")) > 3000 for one in used) <= 2
