"""Links between workers: what is put is taken, in order and whole; and no wake-up is lost, however two workers run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.hashing import choose_queue
from netback.link import EVENT_AT, HEAD_BYTES, INBOX, LINK, collect, has_more, heard, let_go, publish, put, ring
from netback.records import BATCH, PACKET, PORT
from rings.jit import kernel
from rings.ring import RING_END, available, final_check

SIZE = 1 << 18


@kernel
def _has_more(la: int) -> bool:
    return has_more(la)


@kernel
def _let_go(la: int) -> None:
    let_go(la)


@kernel
def _heard(ia: int, end: int) -> None:
    heard(ia, end)


@kernel
def _available(end: int) -> int:
    return available(end)


@kernel
def _final_check(end: int) -> int:
    return final_check(end)


class Link:
    """One, with `size` bytes and a guard behind them, and the inbox that it leads to."""

    def __init__(self, size: int = SIZE) -> None:
        self.memory = np.full(size + 4096, 0xEE, np.uint8)
        self.record, self.inbox, self.end = np.zeros(1, LINK), np.zeros(1, INBOX), np.zeros(1, RING_END)
        self.packet, self.packets = np.zeros(1, PACKET), np.zeros(BATCH, PACKET)
        row = self.record[0]
        row["data"], row["size"], row["inbox"] = self.memory.ctypes.data, size, self.inbox.ctypes.data
        self.at, self.ia, self.ea = (int(a.ctypes.data) for a in (self.record, self.inbox, self.end))
        self.end[0]["peer_prod"], self.end[0]["peer_event"] = self.ia, self.ia + EVENT_AT
        self.end[0]["credit"] = 1 << 30

    def put(self, number: int, data: np.ndarray, have: int) -> int:
        row = self.packet[0]
        row["data"], row["size"], row["have"], row["hash"] = data.ctypes.data, len(data), have, number
        row["fragments"], row["retag"], row["stage"] = 3, 1, 7
        return int(put(self.at, self.packet.ctypes.data))

    def take(self, most: int) -> list[tuple[int, bytes]]:
        n = int(collect(self.at, self.packets.ctypes.data, 0, most))
        found = []
        for row in self.packets[:n]:
            assert row["fragments"] == row["retag"] == row["stage"] == row["verdict"] == 0
            assert row["have"] == row["want"] == row["size"]
            start = int(row["data"]) - self.memory.ctypes.data
            assert start >= 0 and start + int(row["size"]) <= len(self.memory) - 4096
            found.append((int(row["hash"]), self.memory[start : start + int(row["size"])].tobytes()))
        return found


STEPS = st.lists(
    st.one_of(st.tuples(st.just("put"), st.integers(14, 65535)), st.tuples(st.just("take"), st.integers(1, BATCH)),
              st.tuples(st.just("publish"), st.just(0))),
    max_size=80,
)  # fmt: skip


@given(STEPS, st.integers(0, 255))
def test_against_a_list(steps: list[tuple[str, int]], salt: int) -> None:
    link = Link()
    quiet: deque[tuple[int, bytes]] = deque()  # put, and not published
    there: deque[tuple[int, bytes]] = deque()
    for number, (what, value) in enumerate([*steps, ("publish", 0), ("take", BATCH), ("take", BATCH)]):
        if what == "put":
            data = np.full(value, (number ^ salt) & 0xFF, np.uint8)
            have = min(value, 128)
            at = link.put(number, data, have)
            if at == 0:  # then there is no room for it in one piece
                used = sum(HEAD_BYTES + len(one) + 63 & ~63 for _, one in [*quiet, *there])
                assert used + HEAD_BYTES + value > SIZE // 2
                continue
            start = at + HEAD_BYTES - link.memory.ctypes.data
            link.memory[start + have : start + value] = data[have:]  # as a grant copy would
            quiet.append((number, data.tobytes()))
        elif what == "publish":
            assert bool(publish(link.at)) == bool(quiet)
            there += quiet
            quiet.clear()
        else:
            got = link.take(value)
            assert got == [there.popleft() for _ in range(min(value, len(there)))]
            assert bool(_has_more(link.at)) == bool(there)
            _let_go(link.at)
        assert (link.memory[SIZE:] == 0xEE).all()


# How it sleeps, step by step: what two producers and the consumer do to memory, in every order that there is. The words
# are those of the module; a message is one that a producer has published.


class State:
    def __init__(self) -> None:
        self.published = [0, 0]
        self.rung = self.event = self.cons = self.taken = self.wakes = 0
        self.at = -1  # the consumer's next step
        self.asleep = False

    def key(self) -> tuple[object, ...]:
        return (*self.published, self.rung, self.event, self.cons, self.taken, self.wakes, self.asleep, self.at)


def producer(s: State, k: int, count: int, *, ring_first: bool) -> Iterator[None]:
    for _ in range(count):
        if not ring_first:
            s.published[k] += 1
            yield
        s.rung += 1
        number = s.rung
        yield
        if ring_first:
            s.published[k] += 1
            yield
        if number == s.event:
            s.wakes += 1
        yield


def consumer(s: State, *, check_again: bool, hear_first: bool) -> Iterator[None]:
    while True:
        for k, step in enumerate(("hear", "take") if hear_first else ("take", "hear")):
            if step == "hear":
                s.cons = s.rung
            else:
                s.taken = sum(s.published)
            s.at = k
            yield
        if s.rung != s.cons:
            continue
        s.at = 2
        yield
        s.event = s.cons + 1
        s.at = 3
        yield
        if check_again and s.rung != s.cons:
            continue
        s.asleep = True
        s.at = 4
        while s.wakes == 0:
            yield
        s.wakes -= 1
        s.asleep = False


def lost(messages: tuple[int, int], *, ring_first: bool = False, check_again: bool = True,
         hear_first: bool = True) -> bool:  # fmt: skip
    """Whether there is an order in which the consumer sleeps for good with something published."""
    total = sum(messages)

    def run(order: list[int]) -> tuple[State, list[bool]]:
        s = State()
        threads = [producer(s, k, n, ring_first=ring_first) for k, n in enumerate(messages)]
        threads.append(consumer(s, check_again=check_again, hear_first=hear_first))
        done = [False, False, False]
        for k in order:
            if not done[k]:
                done[k] = next(threads[k], "over") == "over"
        return s, done

    seen = set()
    todo: list[list[int]] = [[]]
    while todo:
        order = todo.pop()
        s, done = run(order)
        place = (s.key(), tuple(order.count(k) for k in (0, 1)), done[0], done[1])
        if place in seen or len(order) > 60:
            continue
        seen.add(place)
        if done[0] and done[1] and s.asleep and s.wakes == 0:
            if s.taken != total:
                return True
            continue
        todo += [[*order, k] for k in range(3) if not done[k]]
    return False


@pytest.mark.parametrize("messages", [(1, 0), (2, 0), (1, 1), (2, 1)])
def test_no_order_of_steps_loses_a_wake_up(messages: tuple[int, int]) -> None:
    assert not lost(messages)


@pytest.mark.parametrize("wrong", [{"check_again": False}, {"hear_first": False}, {"ring_first": True}])
def test_and_each_of_its_rules_is_needed(wrong: dict[str, bool]) -> None:
    assert lost((2, 1), **wrong)


def test_the_kernels_do_these_steps() -> None:
    link, data = Link(), np.zeros(60, np.uint8)
    _heard(link.ia, link.ea)
    assert _final_check(link.ea) == 0  # and sleeps
    for k in range(3):
        assert link.put(k, data, 60)
        assert publish(link.at)
        assert bool(ring(link.ia)) == (k == 0)  # once: then it is known to run
    assert _available(link.ea) == 3
    _heard(link.ia, link.ea)
    assert [number for number, _ in link.take(BATCH)] == [0, 1, 2]
    assert _available(link.ea) == 0
    assert not publish(link.at)
    assert not ring(link.ia)  # it is awake
    assert _final_check(link.ea) == 1


@pytest.mark.jit_only("two threads at once")
def test_two_threads() -> None:
    """Sizes that wrap at odd places; the consumer is behind, and then before, and every byte is compared."""
    link, count = Link(1 << 17), 20_000
    sizes = np.random.default_rng(1).integers(14, 9000, count)
    patterns = [np.full(9000, k, np.uint8) for k in range(251)]
    wrong: list[int] = []

    def consume() -> None:
        taken = 0
        while taken < count:
            for number, data in link.take(8):
                if number != taken or data != patterns[number % 251][: sizes[number]].tobytes():
                    wrong.append(number)
                taken += 1
            _let_go(link.at)

    thread = threading.Thread(target=consume)
    thread.start()
    for k in range(count):
        while link.put(k, patterns[k % 251][: sizes[k]], int(sizes[k])) == 0:
            publish(link.at)
        if k % 3 == 0:
            publish(link.at)
    publish(link.at)
    thread.join(60)
    assert not thread.is_alive() and not wrong


def twin(flow: int, queues: int, shards: int, home: int, origin: int) -> int:
    """The queue of a flow, of a guest that asks for nothing, said once more."""
    here = [q for q in range(queues) if (home + q) % shards == origin]
    return here[flow % len(here)] if here else flow % queues


@given(st.integers(0, 2**32 - 1), st.integers(1, 16), st.integers(1, 16), st.data())
def test_the_choice_of_a_queue(flow: int, queues: int, shards: int, data: st.DataObject) -> None:
    home, origin = (data.draw(st.integers(0, shards - 1)) for _ in range(2))
    port, packet = np.zeros(1, PORT), np.zeros(1, PACKET)
    port[0]["home"], packet[0]["origin"], packet[0]["hash"] = home, origin, flow
    queue = int(choose_queue(port.ctypes.data, packet.ctypes.data, queues, shards))
    assert queue == twin(flow, queues, shards, home, origin)

