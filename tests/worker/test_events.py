"""A worker on a device like /dev/xen/evtchn, a socket here: what it hears, what it lets in again, what that costs."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pvdrivers.errors import LeftInUse
from pvdrivers.platform import SEAM
from pvdrivers.storage.uring import queue_nop
from pvdrivers.storage.uring_layout import ring_at as uring_at
from pvdrivers.worker import storm
from pvdrivers.worker.control import RingHandle, Worker, warm
from pvdrivers.worker.marks import req_at, ring_at, take_done, worker_at
from pvdrivers.worker.records import REQ, STATS
from pvdrivers.xen import event_seam
from pvdrivers.xen.event_seam import EVENT_CTX, PORTS_AT_ONCE
from rings import ring as ringlib
from rings.atomics import call, i64, records
from rings.jit import address_of, kernel, seam_function

SLOTS = 32
SIZE = REQ.itemsize


@kernel
def set_chunk(u: int, n: int) -> None:
    uring_at(u)["chunk"] = n


@seam_function
def notify(ctx_at: int, port: int, b: int, c: int) -> int:
    """A system call on Xen; here it is only counted."""
    records(ctx_at, 1, EVENT_CTX)[0]["calls"] += 1
    return i64(0)


@seam_function
def step(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """Takes what is there, an I/O each."""
    ring = ring_at(ra)
    n = ringlib.available(ring["end"])
    cons = records(ring["end"], 1, ringlib.RING_END)[0]["cons"]
    for k in range(n):
        qa = ring["reqs"] + ((cons + k) & (SLOTS - 1)) * SIZE
        req_at(qa)["ring"] = ra
        queue_nop(worker_at(wa)["uring"], qa)
    ringlib.advance(ring["end"], max(n, 0))
    ring["inflight"] += max(n, 0)
    return i64(0)


@seam_function
def finish(wa: int, ra: int, b: int, c: int) -> int:
    """Answers what is done."""
    ring = ring_at(ra)
    qa = take_done(ra)
    while qa != 0:
        ringlib.advance_prod(ring["end"], 1)
        ring["inflight"] -= 1
        qa = req_at(qa)["next"]
    if ringlib.push(ring["end"]):
        seam = records(worker_at(wa)["seam"], 1, SEAM)[0]
        call(seam["event_notify"], seam["event_ctx"], ring["port"], 0, 0)
    return i64(0)


class Events:
    """The handle: one descriptor for all ports."""

    def __init__(self) -> None:
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.fd = ours.detach()
        self.buffers = np.zeros((3, PORTS_AT_ONCE), np.uint32)
        self.record = np.zeros(1, EVENT_CTX)
        self.record["fd"], self.record["sent_at"] = self.fd, -1
        for name, buffer in zip(("taken", "later", "sent"), self.buffers):
            self.record[name] = buffer.ctypes.data
        self.shared_source = self.fd, 0
        self.shared_read = self.buffers.ctypes.data, PORTS_AT_ONCE * 4

    def signal(self, *ports: int) -> None:
        self.kernel.send(struct.pack(f"={len(ports)}I", *ports))

    def unmasked(self) -> list[int]:
        """Ports that were let in again since this was asked."""
        try:
            data = self.kernel.recv(1 << 16)
        except BlockingIOError:
            return []
        return list(struct.unpack(f"={len(data) // 4}I", data))

    def close(self) -> None:
        os.close(self.fd)
        self.kernel.close()


class Guest:
    """The other end of one ring."""

    def __init__(self, worker: Worker, port: int) -> None:
        self.events: Any = worker.events
        self.port = port
        self.page, self.end = np.zeros(4096, np.uint8), np.zeros(1, ringlib.RING_END)
        self.back, self.stats = np.zeros(1, ringlib.RING_END), np.zeros(1, STATS)
        self.reqs = np.zeros(SLOTS, REQ)
        at = self.page.ctypes.data
        ringlib.format_page(at)
        assert ringlib.front_end(self.end.ctypes.data, at, SLOTS, 112) != ringlib.CORRUPT
        assert ringlib.back_end(self.back.ctypes.data, at, SLOTS, 112) != ringlib.CORRUPT
        self.handle: RingHandle = worker.new_ring(None, port)
        row = self.handle.record
        row["end"], row["nr_ents"], row["stats"] = self.back.ctypes.data, SLOTS, self.stats.ctypes.data
        row["reqs"], row["step"], row["finish"] = self.reqs.ctypes.data, address_of(step), address_of(finish)
        worker.attach(self.handle)

    def push(self, n: int) -> None:
        """So many requests, in one go; an event if it was asked for."""
        self.end[0]["prod_pvt"] += n
        if ringlib.push(self.end.ctypes.data):
            self.events.signal(self.port)

    def answered(self, n: int) -> bool:
        """So many in all, of which we look at the next."""
        done = int(self.page[8:12].view(np.uint32)[0])
        self.page[12:16].view(np.uint32)[0] = done + 1
        self.end[0]["cons"] = done
        return done >= n


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.0005)


@contextmanager
def running(on_the_ring: bool, guests: int = 1, *, fails: bool = False) -> Iterator[tuple[Worker, list[Guest]]]:
    """A worker with so many rings, all asleep."""
    warm()
    alert, events = os.eventfd(0), Events()
    seam = np.zeros(1, SEAM)
    seam["event_ctx"] = events.record.ctypes.data
    for name in ("event_deliver", "event_next", "event_unmask"):
        seam[name] = address_of(getattr(event_seam, name))
    seam["event_notify"] = address_of(notify)
    worker = Worker(SimpleNamespace(open_events=lambda: events, seam=lambda _: seam), 0, alert)  # type: ignore[arg-type]
    if on_the_ring and worker.uring.kind != "io_uring":
        pytest.skip(worker.uring.reason)
    set_chunk(worker.uring.address, SLOTS)
    if not on_the_ring:
        worker.record["event_in"] = 0
    ends = [Guest(worker, port) for port in range(1, guests + 1)]
    worker.start()
    try:
        until(lambda: worker.record["sleeps"] > 0 and all(g.handle.record["state"] == 2 for g in ends))
        yield worker, ends
    finally:
        failed = bool(worker.failed)
        for guest in ends:
            with pytest.raises(LeftInUse) if fails else nullcontext():
                worker.detach(guest.handle)
        worker.stop()
        os.close(alert)
        assert failed == fails


def asleep(worker: Worker, passes: int) -> bool:
    return bool(worker.record["sleeps"] > passes)


ways = pytest.mark.parametrize("on_the_ring", [True, False])


@pytest.mark.parametrize(("on_the_ring", "most"), [(True, 3.2), (False, 5.2)])
def test_calls_of_a_visit(on_the_ring: bool, most: float) -> None:
    """Sixteen requests: a call to wait in, one that submits and lets the port in again, and a notification."""
    with running(on_the_ring) as (worker, (guest,)):
        record = guest.events.record[0]
        rounds, total = 60, 0
        for k in range(rounds):
            before = int(worker.uring.enters + record["calls"])
            sleeps = int(worker.record["sleeps"])
            guest.push(16)
            until(lambda n=16 * (k + 1): guest.answered(n))  # type: ignore[misc]
            until(lambda s=sleeps: asleep(worker, s))  # type: ignore[misc]
            time.sleep(0.001)
            total += int(worker.uring.enters + record["calls"]) - before
        assert total / rounds <= most


@ways
def test_each_port_is_let_in_again_once(on_the_ring: bool) -> None:
    with running(on_the_ring, guests=3) as (_, guests):
        events = guests[0].events
        events.unmasked()  # as their rings came
        let_in: list[int] = []
        for k in range(1, 200):
            for guest in guests[: 1 + k % 3]:
                guest.push(1)
            until(lambda: all(g.answered(int(g.end[0]["pushed"])) for g in guests))
            let_in += events.unmasked()  # a socket has room for so much, and evtchn for all
        until(lambda: not any(g.handle.record["masked"] for g in guests))
        time.sleep(0.01)
        let_in += events.unmasked()
        for guest in guests:
            assert let_in.count(guest.port) == guest.stats[0]["events"] > 0


@ways
def test_more_ports_than_a_read_takes(on_the_ring: bool) -> None:
    """Those that are nobody's are not let in again, and no ring of ours waits behind them."""
    with running(on_the_ring) as (_, (guest,)):
        guest.events.unmasked()
        nobodys = list(range(1000, 1000 + 2 * PORTS_AT_ONCE))
        guest.events.signal(*nobodys)
        guest.push(1)
        until(lambda: guest.answered(1))
        seen: list[int] = []
        until(lambda: guest.port in (seen.extend(guest.events.unmasked()) or seen))
        assert set(seen) == {guest.port}


@ways
def test_a_port_is_let_in_with_its_ring(on_the_ring: bool) -> None:
    """It is pending as soon as it is bound. Until there is a ring to look at, it can wake us once."""
    with running(on_the_ring) as (worker, (guest,)):
        guest.events.unmasked()
        before = int(worker.record["events"])
        guest.events.signal(7)
        until(lambda: worker.record["events"] > before)
        time.sleep(0.05)
        assert guest.events.unmasked() == []
        late = Guest(worker, 7)
        try:
            late.push(1)
            until(lambda: late.answered(1))
            until(lambda: 7 in guest.events.unmasked())
        finally:
            worker.detach(late.handle)


@ways
def test_events_are_asked_for_anew_again_and_again(on_the_ring: bool) -> None:
    """What housekeeping does every ten seconds, at any moment: nothing is lost, and nothing is read by two."""
    with running(on_the_ring) as (worker, (guest,)):
        for k in range(1, 1001):
            worker.record["house_at"] = 0
            guest.push(1)
            until(lambda k=k: guest.answered(k))  # type: ignore[misc]
            guest.events.unmasked()
        assert worker.record["house_at"] > 0


def test_a_device_that_fails_ends_the_worker() -> None:
    """Not a word would be heard of any ring; the next process hears all of it."""
    with running(True, fails=True) as (worker, (guest,)):
        guest.events.kernel.shutdown(socket.SHUT_WR)
        until(lambda: bool(worker.failed))


@ways
def test_a_storm_is_held_back_and_no_neighbour_notices(on_the_ring: bool) -> None:
    with running(on_the_ring, guests=2) as (worker, (liar, honest)):
        events = liar.events

        def blow(seconds: float) -> None:
            """As evtchn does it: a port that is masked waits, so there is one as soon as it is let in again."""
            until_then = time.monotonic() + seconds
            while time.monotonic() < until_then:
                if liar.port in events.unmasked():
                    events.signal(liar.port)

        liar.push(1)
        until(lambda: liar.answered(1))
        events.signal(liar.port)
        until(lambda: blow(0.05) or bool(liar.handle.record["storming"]))
        before = int(liar.stats[0]["events"])
        worker.record["house_at"] = 0
        blow(1.0)
        assert int(liar.stats[0]["events"]) - before <= 15
        assert worker.record["house_at"] > 0, "idle rings are looked after meanwhile"
        honest.push(1)
        until(lambda: honest.answered(1))
        liar.push(1)
        until(lambda: blow(0.01) or liar.answered(2))
        assert int(liar.stats[0]["idle_events"]) > storm.MOST and not honest.handle.record["storming"]
        until(lambda: not liar.handle.record["storming"])
        assert os.eventfd_read(worker._alert_fd) == 2
        passes = int(worker.record["passes"])
        time.sleep(0.3)
        assert worker.record["passes"] - passes <= 1, "nobody is waited for any more"


@ways
def test_an_honest_guest_is_no_storm(on_the_ring: bool) -> None:
    with running(on_the_ring) as (_, (guest,)):
        for k in range(1, 4001):
            guest.push(1)
            while not guest.answered(k):
                pass
            guest.events.unmasked()
        assert not guest.handle.record["storming"] and guest.stats[0]["idle_events"] < 1000
