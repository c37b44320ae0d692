"""A back end that dies after any store it makes: every request is answered once, and none executed after that."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.journal.model import STARTS, Backend, Guest, World

kill_after = st.one_of(st.none(), st.integers(0, 12))


class Killed(RuleBasedStateMachine):
    """A guest, and a back end that dies now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.dir = Path(tempfile.mkdtemp(prefix="pvdrivers-test-"))
        self.deaths = 0

    @initialize(nr_ents=st.sampled_from([1, 2, 4, 8, 32]), start=st.sampled_from(STARTS))
    def begin(self, nr_ents: int, start: int) -> None:
        self.guest = Guest(nr_ents, start)
        self.world = World(self.guest)
        self.back = Backend(self.dir / "journal", self.guest, self.world)
        self.back.connect()

    def work(self, steps: Iterator[None], kill: int | None) -> None:
        """Do it, or do `kill` stores of it and die; then be born again, and if need be die while recovering."""
        for done, _ in enumerate(steps):
            if done == kill:
                self.die()
                return

    def die(self, again: int | None = None) -> None:
        self.deaths += 1
        self.back = Backend(self.dir / "journal", self.guest, self.world)
        self.work(self.back.recover(), again)

    @rule(n=st.integers(1, 32))
    def guest_sends(self, n: int) -> None:
        self.guest.send(n)

    @rule()
    def guest_receives(self) -> None:
        self.guest.receive()

    @rule(n=st.integers(1, 32), kill=kill_after)
    def take(self, n: int, kill: int | None) -> None:
        self.work(self.back.take(n), kill)

    @rule(data=st.data(), kill=kill_after)
    def finish(self, data: st.DataObject, kill: int | None) -> None:
        running = len(self.back.running)
        order = data.draw(st.permutations(range(running)))
        self.work(self.back.finish(order[: data.draw(st.integers(0, running))]), kill)

    @rule(again=st.one_of(st.none(), st.integers(0, 6)))
    def kill(self, again: int | None) -> None:
        self.die(again)

    @invariant()
    def nobody_was_told_anything_else_than_was_decided(self) -> None:
        if hasattr(self, "guest"):
            for number, status in self.guest.status.items():
                assert self.world.decided[number] == status

    def teardown(self) -> None:
        try:
            if hasattr(self, "guest"):
                self.drain()
        finally:
            shutil.rmtree(self.dir)

    def drain(self) -> None:
        for _ in range(3):
            self.guest.receive()
            self.work(self.back.take(self.guest.nr_ents), None)
            self.work(self.back.finish(list(range(len(self.back.running)))), None)
        self.guest.receive()
        assert set(self.guest.status) == set(range(self.guest.put)), "a request was lost"
        assert sorted(self.back.free) == list(range(self.guest.nr_ents)), "a record was lost"


TestKilled = Killed.TestCase


@pytest.mark.parametrize("start", STARTS)
def test_killed_at_every_single_store(start: int, tmp_path: Path) -> None:
    """Not at random: for each number of stores a run that dies after just so many, and again while recovering."""
    for again in (None, 0, 1, 2, 3, 4):
        at = 0
        while True:
            guest = Guest(4, start)
            world = World(guest)
            back = Backend(tmp_path / "journal", guest, world)
            back.connect()
            survived = run_and_die(back, at, again)
            if survived:
                assert at > 30
                break
            at += 1


def everything(back: Backend) -> Iterator[None]:
    """A life: one request stays behind while others come and go, answers are out of order."""
    guest = back.guest
    guest.send(4)
    yield from back.take(3)
    yield from back.finish([2, 1])
    guest.receive()
    guest.send(4)
    yield from back.take(4)
    yield from back.finish([2, 0])
    yield from back.take(4)
    guest.receive()


def run_and_die(back: Backend, at: int, again: int | None) -> bool:
    guest, world, path = back.guest, back.world, back.path
    survived = True
    for i, _ in enumerate(everything(back)):
        if i == at:
            survived = False
            break
    for times in (again, None) if again is not None else (None,):
        back = Backend(path, guest, world)
        for i, _ in enumerate(back.recover()):
            if i == times:
                break
    for _ in range(3):
        guest.receive()
        for steps in (back.take(4), back.finish(list(range(len(back.running))))):
            for _ in steps:
                pass
        for _ in back.finish(list(range(len(back.running)))):
            pass
    guest.receive()
    assert set(guest.status) == set(range(guest.put))
    assert guest.status == {n: world.decided[n] for n in guest.status}
    return survived


def test_one_request_stays_behind_while_the_ring_goes_round_many_times(tmp_path: Path) -> None:
    guest = Guest(4, (1 << 32) - 40)
    world = World(guest)
    back = Backend(tmp_path / "journal", guest, world)
    back.connect()
    guest.send(1)
    list(back.take(1))
    for _ in range(100):
        guest.receive()
        guest.send(3)
        list(back.take(3))
        list(back.finish([3, 1, 2][: len(back.running) - 1]))
        back = Backend(tmp_path / "journal", guest, world)
        list(back.recover())
        assert [number for _, number in back.running] == [0]
    list(back.finish([0]))
    guest.receive()
    assert len(guest.status) == guest.put == 301
