"""Producer indices anywhere: either the requests are there, or the device is closed, once, with its name."""

from __future__ import annotations

import random
import threading
import time

import pytest

from pvdrivers.cli.stats import snapshot
from tests.hostile.conftest import Arena
from tests.hostile_frontend import CLOSING, CONNECTED, FLUSH, READ, WRITE, Frontend, request, until


def closed_with(arena: Arena, front: Frontend, violation: str) -> None:
    """The device went to Closing, and log and store say whose it was and why, once."""
    front.wait(CLOSING)
    until(front.error, what="for the error node")
    name = f"domain {front.domid}, device vbd-{front.domid}-51712: "
    assert name + violation in front.error()
    assert arena.log().count(name + violation) == 1


@pytest.mark.parametrize("beyond", [1, 2, 100, 1 << 16, 1 << 31, (1 << 32) - 33])
@pytest.mark.parametrize("start", [0, (1 << 32) - 5])
def test_a_producer_beyond_the_ring(quiet: Arena, beyond: int, start: int) -> None:
    with quiet.liar() as front:
        ring = front.connect(start=start)
        assert front.ask(ring, *[request(FLUSH, id=i) for i in range(9)]) == [0] * 9
        front.push(ring, ring.prod + ring.nr_ents + beyond)
        closed_with(quiet, front, "producer index beyond what the ring can hold")
        front.all_released()
        ring = front.reconnect()
        assert front.ask(ring, request(FLUSH)) == [0], "and may come again in order"


def test_a_producer_that_goes_back(quiet: Arena) -> None:
    with quiet.liar() as front:
        ring = front.connect()
        assert front.ask(ring, *[request(FLUSH, id=i) for i in range(9)]) == [0] * 9
        front.push(ring, ring.prod - 3)
        closed_with(quiet, front, "producer index beyond what the ring can hold")


def test_violations_are_counted_where_the_operator_looks(quiet: Arena) -> None:
    """`pvdrivers stats` tells of them when the ring is gone, and when there is another one."""

    def counted(front: Frontend) -> int:
        device = next(d for d in snapshot(quiet.bed.run_dir) if d.get("domid") == front.domid and d.get("queues"))
        return sum(queue["violations"] for queue in device["queues"])

    with quiet.liar() as front:
        for turn in range(1, 3):
            ring = front.connect() if turn == 1 else front.reconnect()
            assert counted(front) == turn - 1
            front.push(ring, ring.prod + 9999)
            front.wait(CLOSING)
            assert counted(front) == turn


def test_requests_that_fail_are_told_at_powers_of_two(quiet: Arena) -> None:
    with quiet.liar() as front:
        ring = front.connect()
        for turn in range(9):
            assert front.ask(ring, request(READ, [(0xFFFFFFFF, 0, 7)], id=turn, sector=8 * turn)) == [-1]
        log, deadline = "", time.monotonic() + 10
        while "8 of its requests failed" not in log:
            assert time.monotonic() < deadline, log
            time.sleep(0.01)
            log += quiet.log()
        assert log.count("requests failed") <= 4
        assert "8 of its requests failed; the latest of 4096 bytes at byte 28672: a page of its guest (GNTST -3)" in log


def test_a_full_ring_is_no_violation(quiet: Arena) -> None:
    with quiet.liar() as front:
        ring = front.connect()
        for _ in range(50):
            assert front.ask(ring, *[request(FLUSH, id=i) for i in range(32)]) == [0] * 32


@pytest.mark.parametrize("start", [33, 1 << 31])
def test_indices_that_no_ring_has_at_connect(quiet: Arena, start: int) -> None:
    with quiet.liar() as front:
        ring = front.new_ring()
        ring.words[0] = start  # rsp_prod is 0
        front.wait(2)
        front.say(3, **front.keys_of([ring]))
        closed_with(quiet, front, "queue 0: indices that no ring can have")
        front.all_released()


@pytest.mark.parametrize("queues", [1, 3])
def test_one_ring_dies_with_requests_in_flight(quiet: Arena, queues: int) -> None:
    with quiet.liar() as front:
        first = front.connect(queues=queues)
        _, (gref,) = front.page()
        for ring in front.rings:
            front.put(ring, *[request(WRITE, [(gref, 0, 7)], id=i, sector=8 * i) for i in range(32)])
        front.push(first, first.prod + 5000)
        closed_with(quiet, front, "producer index beyond what the ring can hold")
        front.all_released()


def test_all_indices_change_all_the_time(quiet: Arena) -> None:
    """A thread that writes anything to all four indices; each time the device may come back."""
    with quiet.liar() as front:
        for turn in range(4):
            chance = random.Random(turn)
            ring = front.connect() if turn == 0 else front.reconnect()
            _, (gref,) = front.page()
            stop = threading.Event()

            def rewrite(ring=ring, stop=stop, chance=chance) -> None:  # type: ignore[no-untyped-def]
                while not stop.is_set():
                    ring.words[chance.randrange(1, 4)] = chance.choice([0, 1, ring.prod, chance.getrandbits(32)])
                    front.events.notify(ring.port)

            thread = threading.Thread(target=rewrite)
            thread.start()
            for i in range(100):
                front.put(ring, request(READ, [(gref, 0, 7)], id=i, sector=i))
            stop.set()
            thread.join()
            assert front.backend() in (CONNECTED, CLOSING)


def test_violations_are_not_a_way_to_fill_the_log(quiet: Arena) -> None:
    with quiet.liar() as front:
        for turn in range(9):
            ring = front.connect() if turn == 0 else front.reconnect()
            front.push(ring, ring.prod + 1000)
            front.wait(CLOSING)
        assert quiet.log().count("producer index") == 4  # the 1st, 2nd, 4th and 8th
