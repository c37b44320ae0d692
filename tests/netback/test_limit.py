"""The rate of a vif: by a clock of the test's own; and by a daemon, with bytes counted over the time that passed."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from netback.drain import drain
from netback.limit import AGAIN_NS, charge, end_turn, has_credit, may_begin, may_pass
from netback.records import LIMIT, N_EXPIRED, PACKET, PORT, RX_QUEUE
from netback.waiting import WAIT_BYTES, keep
from pvdrivers.cli.stats import snapshot
from pvdrivers.frontends.netfront import Frame
from pvdrivers.worker.records import RING, STATS, WORKER
from rings.jit import kernel

from .conftest import Guest, until


@kernel
def _visit(wa: int, la: int, queue: int, ra: int, size: int, count: int) -> int:
    """What step_tx does, with `count` packets of a size: how many went."""
    if not may_begin(wa, la, queue, ra):
        return 0
    sent = 0
    while sent < min(count, 32) and has_credit(la):
        charge(la, queue, size)
        sent += 1
    end_turn(la, queue, 1 if count > sent else 0)
    return sent


@pytest.mark.parametrize("rate", [2e3, 1e6, 125e6, 5e9])
@pytest.mark.parametrize("sizes", [(1500,), (64, 1500, 9000, 65535), (1000, 1000, 1000, 1000)])
def test_over_time_it_is_the_rate_and_each_queue_has_its_share(rate: float, sizes: tuple[int, ...]) -> None:
    """A worker that goes round until nothing may pass, sleeps as it is told to, and sometimes longer."""
    worker, limit, rings = np.zeros(1, WORKER), np.zeros(1, LIMIT), np.zeros(len(sizes), RING)
    w, wa, la = worker[0], worker.ctypes.data, limit.ctypes.data
    w["rings"], w["top_ring"], w["max_rings"] = rings.ctypes.data, len(sizes), len(sizes)
    burst = max(131072.0, rate / 50)
    limit[0]["rate"], limit[0]["burst"] = rate / 1e9, burst
    begin = w["now"] = 10**9
    sent = np.zeros(len(sizes))
    rng = np.random.default_rng(1)
    for turn in range(2000):
        before = -1.0
        while before != sent.sum():
            before = sent.sum()
            for queue, size in enumerate(sizes):
                ra = rings.ctypes.data + queue * RING.itemsize
                sent[queue] += int(_visit(wa, la, queue, ra, size, 1000)) * size
        w["now"] = max(int(w["now"]) + 1000, int(w["wake_at"]))
        if turn % 100 == 0:
            w["now"] += rng.integers(0, 3_000_000)
        rings["wake_at"], w["wake_at"] = 0, 0
        most = (int(w["now"]) - begin) / 1e9 * rate + burst + max(sizes)
        assert sent.sum() <= most
    passed = (int(w["now"]) - begin) / 1e9
    assert sent.sum() >= passed * rate * 0.98
    if sent.sum() > 3 * burst:
        shares = sent / sent.sum()
        assert shares.min() > 0.8 / len(sizes), shares


def test_no_rate_is_no_limit() -> None:
    worker, limit, ring = np.zeros(1, WORKER), np.zeros(1, LIMIT), np.zeros(1, RING)
    for _ in range(100):
        assert _visit(worker.ctypes.data, limit.ctypes.data, 0, ring.ctypes.data, 65535, 32) == 32


def test_one_worker_at_a_time_looks_into_the_bucket() -> None:
    """Two have queues of a vif: who finds the other at it comes again, and takes nothing."""
    workers, limit, rings = np.zeros(2, WORKER), np.zeros(1, LIMIT), np.zeros(2, RING)
    workers["now"] = 10**9
    la, wa, ra = (int(array.ctypes.data) for array in (limit, workers, rings))
    wb, rb = wa + WORKER.itemsize, ra + RING.itemsize
    limit[0]["rate"], limit[0]["burst"], limit[0]["shared"] = 1.0, 131072.0, 1
    assert may_begin(wa, la, 0, ra)
    tokens = float(limit[0]["tokens"])
    assert not may_begin(wb, la, 1, rb)
    assert not may_pass(la, 1, 1500, 10**9)
    assert rings[1]["wake_at"] == 10**9 + AGAIN_NS and limit[0]["tokens"] == tokens
    end_turn(la, 1, 1)  # not his
    assert limit[0]["holder"] == 1
    end_turn(la, 0, 0)
    assert may_pass(la, 1, 1500, 10**9) and limit[0]["tokens"] == tokens - 1500 and limit[0]["holder"] == 0
    limit[0]["rate"] = 0  # while somebody is at it
    limit[0]["holder"] = 2
    end_turn(la, 1, 0)
    assert limit[0]["holder"] == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_queue_whose_last_packet_expires_waits_for_no_turn(shared: bool) -> None:
    """Else packets of the others could not pass at once any more, until it has some again."""
    worker, ring, port, limit = np.zeros(1, WORKER), np.zeros(1, RING), np.zeros(1, PORT), np.zeros(1, LIMIT)
    queue, packet, stats = np.zeros(1, RX_QUEUE), np.zeros(1, PACKET), np.zeros(1, STATS)
    memory, data = np.zeros(WAIT_BYTES, np.uint8), np.zeros(60, np.uint8)
    wa, ra, la = (int(array.ctypes.data) for array in (worker, ring, limit))
    port[0]["to_guest"], queue[0]["base"], packet[0]["data"] = la, memory.ctypes.data, data.ctypes.data
    ring[0]["priv"], ring[0]["device"], ring[0]["stats"] = (int(x.ctypes.data) for x in (queue, port, stats))
    packet[0]["size"] = packet[0]["have"] = 60
    limit[0]["rate"], limit[0]["burst"], limit[0]["shared"] = 1e-9, 131072.0, shared
    limit[0]["tokens"], limit[0]["at"], worker[0]["now"] = -1.0, 10**9, 10**9
    assert keep(queue.ctypes.data, packet.ctypes.data, 10**9 + 1)
    drain(wa, 0, ra)
    assert limit[0]["waiting"] == 1 and queue[0]["count"] == 1, "there is no credit"
    limit[0]["tokens"], worker[0]["now"], limit[0]["holder"] = 1e5, 10**9 + 1, 2 * shared
    drain(wa, 0, ra)
    assert queue[0]["count"] == 0 and stats[0]["kinds"][N_EXPIRED] == 1
    if shared:  # another worker is at it
        assert limit[0]["waiting"] == 1 and 0 < ring[0]["wake_at"] <= 10**9 + 1 + AGAIN_NS
        limit[0]["holder"] = 0
        drain(wa, 0, ra)
    assert limit[0]["waiting"] == 0 and limit[0]["holder"] == 0
    assert may_pass(la, 1, 60, 10**9 + 1)


def flow(guest: Guest, to: Guest, port: int, size: int) -> bytes:
    """An IPv4 packet with UDP; its port says which queue it is in."""
    ip = bytes([0x45, 0]) + (size - 14).to_bytes(2, "big") + bytes([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2])
    return guest.frame(to, (ip + port.to_bytes(2, "big")).ljust(size - 14, b"\0"), 0x800)


def counted(guest: Guest, what: str) -> int:
    return sum(q[what] for d in snapshot(guest.net.run_dir) if d["device"] == guest.name for q in d["queues"])


def at_once(guest: Guest, what: str) -> tuple[float, int]:
    """A time, and what had been counted then: of some tries the one that took the shortest time."""
    found = []
    for _ in range(5):
        began, count = time.monotonic(), counted(guest, what)
        found.append((time.monotonic() - began, began, count))
    took, began, count = min(found)
    return began + took / 2, count


def measured(guest: Guest, what: str, rate: float, seconds: float) -> float:
    """Bytes a second over some seconds, as a part of what was asked. The median of many ends, as each may be late."""
    begin, before = at_once(guest, what)
    found = []
    while time.monotonic() - begin < seconds:
        time.sleep(0.02)
        end, count = at_once(guest, what)
        if end - begin > seconds * 0.8:
            found.append((count - before) / (end - begin) / rate)
    return sorted(found)[len(found) // 2]


def keeps(guest: Guest, what: str, rate: float, within: float) -> bool:
    """Whether that is the rate, in one of three stretches: a machine with other work may hold up who counts."""
    return any(abs(measured(guest, what, rate, 3) - 1) <= within for _ in range(3))


@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize("direction", ["from the guest", "to the guest"])
def test_the_rate_of_a_vif_with_four_queues(net: Any, direction: str) -> None:
    """Linux gives each queue the whole rate, and limits one direction. And it changes while packets go."""
    rate = 4_000_000
    limited = {"queues": 4, "be": {"rate": f"{rate},1000000"}}
    a, b = net.guest(**(limited if "from" in direction else {"queues": 4})), net.guest(queues=4)
    if "to" in direction:
        b = net.guest(**limited)
    guest, what = (a, "bytes_read") if "from" in direction else (b, "bytes_written")
    over = threading.Event()
    packets = [[Frame(flow(a, b, 1000 + 4 * k + q, 9000)) for k in range(16)] for q in range(4)]

    def send(queue: int) -> None:
        while not over.is_set():
            try:
                a.vif.send_all(packets[queue], timeout=0.2, queue=queue)
            except TimeoutError:
                pass
            time.sleep(0.02)

    def receive(queue: int) -> None:
        while not over.is_set():
            try:
                b.vif.receive_all(64, 0.2, queue=queue)
            except TimeoutError:
                pass

    threads = [threading.Thread(target=call, args=(q,)) for q in range(4) for call in (send, receive)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: counted(guest, what) > rate * 1.5)  # what it had saved up is gone
        assert keeps(guest, what, rate, 0.02)
        net.dom0.store.write(f"{guest.backend}/rate", f"{rate // 2},1000000")
        time.sleep(0.3)
        assert keeps(guest, what, rate / 2, 0.05)
        net.dom0.store.rm(f"{guest.backend}/rate")
        before = counted(guest, what)
        until(lambda: counted(guest, what) - before > rate * 2)
    finally:
        over.set()
        for thread in threads:
            thread.join()
