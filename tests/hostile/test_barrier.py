"""Barriers are for the whole disk: over several queues, of one worker and of two, at once and under load."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pvdrivers.frontends.load import Load, Plan
from tests.hostile.conftest import Arena
from tests.hostile_frontend import (
    BARRIER,
    CLOSED,
    CLOSING,
    FLUSH,
    READ,
    WRITE,
    Frontend,
    Ring,
    discard,
    request,
    until,
)


@pytest.fixture(scope="module")
def two(make_arena: Callable[..., Arena]) -> Arena:
    return make_arena("--strict", "--workers", "2")


@pytest.fixture(params=["one worker", "two workers"])
def any_arena(request: pytest.FixtureRequest) -> Arena:
    return request.getfixturevalue("two" if request.param == "two workers" else "arena")


def fill(data: np.ndarray, k: int, value: int) -> None:
    data[4096 * k : 4096 * (k + 1)] = value


@pytest.mark.parametrize("where", ["file", "memory:1M"])
def test_order_around_a_barrier(any_arena: Arena, where: str) -> None:
    """On its own ring: what was put before it is answered before it, and what came later reads what those wrote.

    What another queue holds at that moment may be on either side; that it comes to rest is seen by the barrier being
    answered at all while that queue is full, in every one of many rounds and from either side.
    """
    params = any_arena.image() if where == "file" else where
    with any_arena.liar(params) as front:
        front.connect(queues=2, order=1)
        a, b = front.rings
        data, grefs = front.page(64)
        for turn in range(40):
            value = turn + 1
            for k in range(32):
                fill(data, k, value)
            front.put(a, *[request(WRITE, [(grefs[k], 0, 7)], id=k, sector=8 * k) for k in range(16)])
            front.put(b, *[request(WRITE, [(grefs[k], 0, 7)], id=k, sector=8 * k) for k in range(16, 32)])
            holder, other = (a, b) if turn % 2 else (b, a)
            # On one ring order is certain: all that is put after the barrier is done after it.
            front.put(holder, request(BARRIER, id=100),
                      *[request(READ, [(grefs[32 + k], 0, 7)], id=200 + k, sector=8 * (k + (0 if holder is a else 16)))
                        for k in range(16)])  # fmt: skip
            order = [i for i, _, status in front.answers(holder, 33) if status == 0 or pytest.fail("failed")]
            assert set(order[:16]) == set(range(16)) or set(order[:16]) == set(range(16, 32))
            assert order[16] == 100, "the barrier comes after what was put before it, and before what came later"
            assert {s for _, _, s in front.answers(other, 16)} == {0}
            assert (data[4096 * 32 : 4096 * 48] == value).all()
        front.close()
        front.all_released()


class Writers:
    """Two queues full of writes, from a thread each, while somebody asks for barriers."""

    def __init__(self, front: Frontend, seed: int) -> None:
        self.front = front
        self.stop = threading.Event()
        self.troubles: list[BaseException] = []
        self.barriers = 0
        self.threads = [threading.Thread(target=self.run, args=(ring, seed + q)) for q, ring in enumerate(front.rings)]
        for thread in self.threads:
            thread.start()

    def run(self, ring: Ring, seed: int) -> None:
        chance = random.Random(seed)
        try:
            _, grefs = self.front.page(4)
            while not self.stop.is_set():
                slots = []
                for i in range(chance.randrange(1, 32)):
                    op = chance.choice([READ, WRITE, WRITE, BARRIER, FLUSH])
                    pages = [(chance.choice(grefs), 0, 7)] if op in (READ, WRITE) or chance.random() < 0.5 else []
                    slots.append(request(op, pages, id=i, sector=8 * chance.randrange(256)))
                assert set(self.front.ask(ring, *slots)) == {0}
                self.barriers += sum(slot[0] == BARRIER for slot in slots)
        except BaseException as e:
            self.troubles.append(e)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)
        assert not self.troubles, repr(self.troubles[0])


@pytest.mark.parametrize("queues", [2, 4])
def test_barriers_on_all_queues_at_once(any_arena: Arena, queues: int) -> None:
    """No two wait for each other for ever."""
    with any_arena.liar() as front:
        front.connect(queues=queues)
        writers = Writers(front, 1)
        until(lambda: writers.barriers > 400 or writers.troubles, 60)
        writers.end()
        front.close()
        front.all_released()


def test_a_ring_goes_while_its_barrier_waits(any_arena: Arena) -> None:
    """Both queues full, a barrier on each, and then the guest closes, breaks its ring, or is unplugged."""
    for turn in range(12):
        with any_arena.liar(memory_mib=4) as front:
            front.connect(queues=2)
            _, grefs = front.page(4)
            for ring in front.rings:
                front.put(ring, *[request(WRITE, [(grefs[0], 0, 7)], id=i, sector=8 * i) for i in range(20)],
                          request(BARRIER, [(grefs[1], 0, 7)], id=20), *[request(FLUSH, id=21 + i) for i in range(5)],
                          request(BARRIER, id=30))  # fmt: skip
            if turn % 3 == 1:
                front.push(front.rings[turn % 2], front.rings[0].prod + 9999)
                front.wait(CLOSING)
            front.say(CLOSING)
            front.wait(CLOSING, CLOSED)
            front.say(CLOSED)
            front.wait(CLOSED)
            front.all_released()


def test_a_flush_with_data_and_a_barrier_with_data(any_arena: Arena) -> None:
    with any_arena.liar() as front:
        ring = front.connect()
        data, grefs = front.page(3)
        for op, value in ((FLUSH, 7), (BARRIER, 9)):
            fill(data, 0, value)
            assert front.ask(ring, request(op, [(grefs[0], 0, 7)], sector=80)) == [0]
            assert front.ask(ring, request(READ, [(grefs[1], 0, 7)], sector=80)) == [0]
            assert (data[4096:8192] == value).all()


@pytest.mark.parametrize("where", ["file", "memory:1M", "null:1M", "buffered"])
@pytest.mark.parametrize("secure", [0, 1])
def test_discards(arena: Arena, where: str, secure: int) -> None:
    """What was discarded reads as zeros here, and its neighbours do not; a secure one was zeroed before."""
    image = arena.image() if where in ("file", "buffered") else ""
    params = f"{image or where},secure_discard=on" + (",direct=no" if where == "buffered" else "")
    with arena.liar(params) as front:
        ring = front.connect()
        assert front.key("discard-secure") == "1"
        data, grefs = front.page(16)
        whole = [(g, 0, 7) for g in grefs[:8]]
        for k in range(8):
            fill(data, k, k + 1)
        assert front.ask(ring, request(WRITE, whole, sector=64)) == [0]
        assert front.ask(ring, discard(72, 24, flag=secure), discard(0, 0, flag=secure)) == [0, 0]
        assert front.ask(ring, request(READ, [(g, 0, 7) for g in grefs[8:]], sector=64)) == [0]
        if where != "null:1M":
            for k in range(8):
                got = data[4096 * (8 + k) : 4096 * (9 + k)]
                assert (got == (0 if 1 <= k <= 3 else k + 1)).all(), k
        if image:
            with open(image, "rb") as f:
                f.seek(72 * 512)
                assert f.read(24 * 512) == bytes(24 * 512)
        assert front.ask(ring, discard(0, 2048, flag=secure)) == [0]


def test_discards_of_a_whole_disk_in_memory_hold_up_nobody(arena: Arena) -> None:
    """A ring full of them; a neighbour's request waits for a piece of one, not for all."""
    with arena.liar("memory:128M") as front:
        ring = front.connect()
        front.put(ring, *[discard(0, (128 << 20) // 512, id=i, flag=i & 1) for i in range(32)])
        slowest, put = 0.0, time.monotonic()
        for _ in range(20):
            began = time.monotonic()
            arena.neighbour.disk.read(0, 4096)
            slowest = max(slowest, time.monotonic() - began)
        assert len(front.answers(ring, 32, timeout=60)) == 32
        total = time.monotonic() - put
        assert slowest < max(1.0, total / 4), f"{slowest:.2f} s for one read, {total:.2f} s for all discards"


@pytest.mark.slow
def test_barriers_under_a_verified_load(two: Arena) -> None:
    """The honest frontend: two queues of verified load on one disk while another storms with barriers."""
    disk = two.bed.disk(two.image(8 << 20), memory_mib=32, queues=2, ring_order=2)
    load = Load(disk, Plan(depth=16, write_percent=50, verify="all", seconds=10))
    with two.liar() as front:
        front.connect(queues=2)
        writers = Writers(front, 5)
        load.start()
        result = load.wait(60)
        writers.end()
    assert result.right and result.verified > 0


@pytest.fixture(autouse=True)
def _alive(arena: Arena) -> Iterator[None]:
    yield
    arena.check()
