"""Answers on their way to a ring: nothing of a slot changes before all of a pass are certain, and who comes after a
process that died puts what was."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.answers import ANSWERS, answer_at, put_again, settle
from pvdrivers.worker.journal import STEP_COMPLETED, STEP_DONE, STEP_NOTIFIED, STEP_PUSHED, STEP_PUT, STEPS
from pvdrivers.worker.records import RING, WORKER
from rings.jit import kernel
from rings.ring import RING_END, advance, advance_prod, back_end
from tests.rings.guard import Guarded

from .conftest import Net
from .test_lives import Traffic

KINDS = {"tx": (256, 12, 4), "rx": (256, 8, 8), "control": (128, 16, 12)}
"""Slots of a ring, bytes of one, and bytes of an answer."""

where = kernel(lambda ra, index: answer_at(ra, index))
taken = kernel(lambda end, n: advance(end, n))
answered = kernel(lambda end, n: advance_prod(end, n))


class Bed:
    """A ring on which a guest has put requests, as one process has it, or the next one."""

    def __init__(self, kind: str, at: int, requests: int, before: Bed | None = None) -> None:
        self.slots, self.size, self.answer = KINDS[kind]
        self.page = before.page if before else Guarded(4096)
        self.answers = before.answers if before else Guarded(ANSWERS.itemsize)
        self.ring, self.end, self.worker = np.zeros(1, RING), np.zeros(1, RING_END), np.zeros(1, WORKER)
        if before is None:
            self.page.bytes[64:] = np.arange(4096 - 64, dtype=np.uint32).astype(np.uint8)
            self.index("req_prod")[0] = (at + requests) & 0xFFFFFFFF
            self.index("rsp_prod")[0] = at
        row = self.ring[0]
        row["end"], row["journal"] = self.end.ctypes.data, self.answers.address
        row["nr_ents"], row["entry_size"] = self.slots, self.size
        assert back_end(self.end.ctypes.data, self.page.address, self.slots, self.size) == 0

    def index(self, name: str) -> np.ndarray:
        at = {"req_prod": 0, "rsp_prod": 8}[name]
        return self.page.bytes[at : at + 4].view(np.uint32)

    def slot(self, index: int) -> np.ndarray:
        first = 64 + index % self.slots * self.size
        return self.page.bytes[first : first + self.size]

    def answer_all(self, n: int) -> list[bytes]:
        """Take n and collect an answer for each."""
        out = []
        for k in range(n):
            index = int(self.end[0]["prod_pvt"])
            text = struct.pack("<IIII", 0xA0000000 + k, index, ~k & 0xFFFFFFFF, 7)[: self.answer]
            offset = int(where(self.ring.ctypes.data, index)) - self.answers.address
            self.answers.bytes[offset : offset + self.answer] = np.frombuffer(text, np.uint8)
            taken(self.end.ctypes.data, 1)
            answered(self.end.ctypes.data, 1)
            out.append(text)
        return out


AT = st.sampled_from([0, 3, 250, 0xFFFFFFF0])


@given(st.sampled_from(list(KINDS)), AT, st.integers(1, 100), st.data())
def test_what_was_settled_is_put_by_the_next_and_nothing_else(kind: str, at: int, requests: int, data: Any) -> None:
    one = Bed(kind, at, requests)
    before = one.page.bytes.copy()
    n = data.draw(st.integers(1, requests))
    wanted = one.answer_all(n)
    assert (one.page.bytes == before).all(), "not a slot before it is certain"
    if data.draw(st.booleans(), "it dies before that"):
        next = Bed(kind, at, requests, one)
        assert put_again(next.ring.ctypes.data) == 0
        assert (one.page.bytes == before).all()
        return
    settle(one.worker.ctypes.data, one.ring.ctypes.data)
    done = one.page.bytes.copy()
    for k in range(data.draw(st.integers(0, n), "it dies when so many are put"), n):
        one.slot(at + k)[:] = before[64 + (at + k) % one.slots * one.size :][: one.size]
    next = Bed(kind, at, requests, one)
    assert put_again(next.ring.ctypes.data) == n
    for k, text in enumerate(wanted):
        was = before[64 + (at + k) % one.slots * one.size :][: one.size]
        assert next.slot(at + k).tobytes() == text + was[next.answer :].tobytes()
    assert (next.page.bytes[64:] == done[64:]).all()
    assert next.index("rsp_prod")[0] == next.end[0]["cons"] == next.end[0]["prod_pvt"] == (at + n) & 0xFFFFFFFF
    one.page.check()
    one.answers.check()
    # And only once.
    assert put_again(Bed(kind, at, requests, next).ring.ctypes.data) == 0


@given(st.sampled_from(list(KINDS)), AT, st.integers(1, 100), st.integers(0, 0xFFFFFFFF), st.integers(0, 300))
def test_a_guest_that_changes_the_indices(kind: str, at: int, requests: int, rsp_prod: int, more: int) -> None:
    """It harms nobody but itself: what is put is within its ring, and no more than it has requests."""
    one = Bed(kind, at, requests)
    one.answer_all(requests)
    settle(one.worker.ctypes.data, one.ring.ctypes.data)
    one.index("rsp_prod")[0], one.index("req_prod")[0] = rsp_prod, (rsp_prod + more) & 0xFFFFFFFF
    if more > one.slots:
        return  # CORRUPT: it is not attached
    next = Bed(kind, at, requests, one)
    assert 0 <= put_again(next.ring.ctypes.data) <= more
    one.page.check()
    one.answers.check()


@pytest.mark.jit_only("a real daemon serves")
@pytest.mark.parametrize(
    "step", [STEP_COMPLETED, STEP_DONE, STEP_PUT, STEP_PUSHED, STEP_NOTIFIED], ids=lambda step: STEPS[step]
)
def test_killed_at_each_step(own: Net, step: int) -> None:
    """No packet but what was sent, and no answer that the guests do not expect: theirs is not to notice."""
    a, b = own.guest(), own.guest()
    with Traffic(a, b) as traffic:
        traffic.goes_on()
        for count in (101, 240):
            own.daemon.stop()
            own.daemon.start(PVDRIVERS_TEST_KILL=f"{step}:{count}")
            own.daemon.dies(60)
            own.daemon.start()
            traffic.goes_on()
            assert traffic.strange == 0
    for guest in (a, b):
        assert guest.counted("refused") == guest.counted("failed") == 0
        assert guest.vif.connections == 1 and guest.vif.stats()["state"] == "Connected"
