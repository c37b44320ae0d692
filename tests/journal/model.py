"""A guest and a queue's back end on one ring, in plain Python but for the journal: its file and commit points are real.

The back end's work is written as generators that pause after each store that outlives the process: to kill it there
is to drop the generator and all that is private. The order of the stores is that of blkback/queue.py and attach.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pvdrivers.journal import Journal
from pvdrivers.worker.journal import (
    FREE,
    JOURNAL_RECORD,
    PAYLOAD_AT,
    commit_consumed,
    commit_done,
    commit_free,
    commit_taken,
)
from pvdrivers.worker.marks import ring_at
from pvdrivers.worker.records import RING
from rings.atomics import load64, store64
from rings.jit import kernel

WRAP = 1 << 32
STARTS = [0, 1, (1 << 31) - 3, 1 << 31, WRAP - 3, WRAP - 1]
WHO = "3d9f|vbd-1-51712|x86_64-abi|False|8@3"


@kernel
def taken(record: int, index: int) -> None:
    commit_taken(record, index, 0)


@kernel
def consumed(ra: int, cons: int) -> None:
    commit_consumed(ring_at(ra), cons)


@kernel
def done(record: int, status: int, index: int) -> None:
    commit_done(record, status, index)


@kernel
def free(record: int) -> None:
    commit_free(record)


@kernel
def put_payload(record: int, number: int) -> None:
    store64(record + PAYLOAD_AT, number)


@kernel
def payload(record: int) -> int:
    return load64(record + PAYLOAD_AT)


class Guest:
    """What is in memory of the guest: the ring, and what it remembers of each request."""

    def __init__(self, nr_ents: int, start: int) -> None:
        self.nr_ents = nr_ents
        self.slots: list[tuple[str, int, int]] = [("", 0, 0)] * nr_ents
        self.req_prod = self.rsp_prod = start
        self.rsp_cons = start
        self.put = 0
        self.status: dict[int, int] = {}  # request -> what it was told
        self.told: set[int] = set()  # pushed: the guest may have seen it, and may use page and sector again

    def room(self) -> int:
        return self.nr_ents - (self.req_prod - self.rsp_cons) % WRAP

    def send(self, n: int) -> None:
        for _ in range(min(n, self.room())):
            self.slots[self.req_prod % self.nr_ents] = ("req", self.put, 0)
            self.put += 1
            self.req_prod = (self.req_prod + 1) % WRAP

    def receive(self) -> None:
        while self.rsp_cons != self.rsp_prod:
            what, number, status = self.slots[self.rsp_cons % self.nr_ents]
            assert what == "rsp" and number < self.put
            assert number not in self.status, "answered twice"
            self.status[number] = status
            self.rsp_cons = (self.rsp_cons + 1) % WRAP


class World:
    """What the outside has seen: which request was executed when."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.decided: dict[int, int] = {}  # request -> status that was committed

    def execute(self, number: int) -> int:
        """The I/O of a request; returns its status."""
        assert number not in self.guest.told, "executed after it was answered"
        assert number not in self.decided, "executed after its outcome was committed"
        return -(number % 3)


class Backend:
    """A process. Everything here but the journal's file dies with it."""

    def __init__(self, path: Path, guest: Guest, world: World) -> None:
        self.path, self.guest, self.world = path, guest, world
        self.ring = np.zeros(1, RING)
        self.free: list[int] = []
        self.running: list[tuple[int, int]] = []  # (record, request)
        self.cons = self.prod = 0

    def _use(self, journal: Journal) -> None:
        self.journal = journal
        self.ring[0]["journal"] = journal.queue_address(0)
        self.base = journal.records_address(0)

    def record(self, index: int) -> int:
        return self.base + index * JOURNAL_RECORD.itemsize

    def connect(self) -> None:
        """A device that is new."""
        self._use(Journal.create(self.path, WHO, [self.guest.nr_ents]))
        self.cons = self.prod = self.guest.rsp_prod
        self.journal.reset(0, self.cons)
        self.free = list(range(self.guest.nr_ents))

    def recover(self) -> Iterator[None]:
        """Go on where a process died. blkback/attach.py, _recover."""
        guest = self.guest
        journal = Journal.open(self.path, WHO, [guest.nr_ents])
        assert journal is not None
        self._use(journal)
        found = journal.recover(0, guest.rsp_prod)
        assert found is not None, "an honest guest and an honest journal fit"
        yield
        self.cons, self.prod = found.req_cons, guest.rsp_prod
        for i in found.answer:
            self.respond(payload(self.record(i)), int(journal.records(0)[i]["status"]))
            yield
        self.push()
        yield
        for i in found.answer:
            journal.records(0)[i]["state"] = FREE
            yield
        self.running = [(i, payload(self.record(i))) for i in found.execute]
        self.free = [i for i in range(guest.nr_ents) if i not in set(found.execute)]

    def take(self, n: int) -> Iterator[None]:
        """blkback/queue.py, _take."""
        waiting = (self.guest.req_prod - self.cons) % WRAP
        assert waiting <= self.guest.nr_ents
        new = []
        for k in range(min(n, waiting)):
            index = self.free.pop()
            at = (self.cons + k) % WRAP
            what, number, _ = self.guest.slots[at % self.guest.nr_ents]
            assert what == "req", "a request was overwritten before it was taken"
            put_payload(self.record(index), number)
            yield
            taken(self.record(index), at)
            yield
            new.append((index, number))
        self.cons = (self.cons + len(new)) % WRAP
        consumed(self.ring.ctypes.data, self.cons)
        yield
        self.running += new

    def respond(self, number: int, status: int) -> None:
        self.guest.slots[self.prod % self.guest.nr_ents] = ("rsp", number, status)
        self.prod = (self.prod + 1) % WRAP

    def push(self) -> None:
        guest = self.guest
        at = guest.rsp_prod
        while at != self.prod:
            guest.told.add(guest.slots[at % guest.nr_ents][1])
            at = (at + 1) % WRAP
        guest.rsp_prod = self.prod

    def finish(self, which: list[int]) -> Iterator[None]:
        """Some of what runs comes to its end, in this order. blkback/queue.py, finish."""
        ended = [self.running[i] for i in which]
        self.running = [r for i, r in enumerate(self.running) if i not in set(which)]
        outcomes = [(index, number, self.world.execute(number)) for index, number in ended]
        yield
        for index, number, status in outcomes:
            done(self.record(index), status, self.prod)
            self.world.decided[number] = status
            yield
            self.respond(number, status)
            yield
        self.push()
        yield
        for index, _, _ in outcomes:
            free(self.record(index))
            self.free.append(index)
            yield
