"""Front and back against lists: order, no overfilling, a wake-up exactly when one was asked for."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rings import ring
from rings.ring import RING_END
from tests.rings.ends import STARTS, WRAP, Ring
from tests.rings.guard import Guarded, guarded

ENTRY = 20


class End:
    """What one end should be like: messages as numbers, in lists."""

    def __init__(self) -> None:
        self.written: deque[int] = deque()  # put, not pushed
        self.sent: deque[int] = deque()  # pushed, not taken by the peer
        self.awaited = True  # the peer wants to be woken by the next one
        self.notify_sent = self.notify_saved = 0

    def pushed(self, notify: bool) -> None:
        """Both ways: no wake-up may be lost, none may be needless."""
        assert notify == (self.awaited and bool(self.written))
        if self.written:
            self.awaited = False
        self.notify_sent += notify
        self.notify_saved += not notify
        self.sent += self.written
        self.written.clear()


class TwoEnds(RuleBasedStateMachine):
    """Two ends that take turns."""

    @initialize(nr_ents=st.sampled_from([1, 2, 4, 8]), start=st.sampled_from(STARTS))
    def begin(self, nr_ents: int, start: int) -> None:
        self.ring = Ring(nr_ents, ENTRY, start)
        self.front, self.back = End(), End()
        self.at_back: deque[int] = deque()  # requests taken, not answered
        self.next = 0
        self.outstanding = 0  # requests put, whose response has not been taken

    def message(self, number: int) -> int:
        self.held = guarded(number.to_bytes(8, "little") + bytes([number & 0xFF] * (ENTRY - 8)))
        return self.held.address

    def take(self, end: int, peer: End, limit: int) -> list[int]:
        expected = list(peer.sent)[:limit]
        out = Guarded(len(expected) * ENTRY)
        assert ring.take(end, out.address, ENTRY, limit) == len(expected)
        got = [int.from_bytes(m[:8].tobytes(), "little") for m in out.bytes.reshape(-1, ENTRY)]
        assert got == expected
        for _ in got:
            peer.sent.popleft()
        return got

    @rule(n=st.integers(1, 9))
    def front_puts(self, n: int) -> None:
        for _ in range(min(n, ring.room(self.ring.f))):
            ring.put(self.ring.f, self.message(self.next))
            self.front.written.append(self.next)
            self.next += 1
            self.outstanding += 1

    @rule()
    def front_pushes(self) -> None:
        self.front.pushed(bool(ring.push(self.ring.f)))

    @rule(limit=st.integers(1, 9))
    def back_takes(self, limit: int) -> None:
        self.at_back += self.take(self.ring.b, self.front, limit)

    @rule(n=st.integers(1, 9), swap=st.booleans())
    def back_answers(self, n: int, swap: bool) -> None:
        for _ in range(min(n, len(self.at_back))):
            number = self.at_back.pop() if swap else self.at_back.popleft()
            ring.put(self.ring.b, self.message(number))
            self.back.written.append(number)

    @rule()
    def back_pushes(self) -> None:
        self.back.pushed(bool(ring.push(self.ring.b)))

    @rule(limit=st.integers(1, 9))
    def front_takes(self, limit: int) -> None:
        self.outstanding -= len(self.take(self.ring.f, self.back, limit))

    @rule()
    def back_rests(self) -> None:
        waiting = ring.final_check(self.ring.b)
        assert waiting == len(self.front.sent)
        if not waiting:
            self.front.awaited = True

    @rule()
    def front_rests(self) -> None:
        waiting = ring.final_check(self.ring.f)
        assert waiting == len(self.back.sent)
        if not waiting:
            self.back.awaited = True

    @rule()
    @precondition(lambda self: self.next)
    def back_dies_and_comes_again_with_a_journal(self) -> None:
        r, cons = self.ring, int(self.ring.back["cons"][0])
        r.back = np.zeros(1, RING_END)
        r.b = r.back.ctypes.data
        assert ring.back_end(r.b, r.sring, r.nr_ents, ENTRY) == 0
        r.back["cons"] = cons
        # Responses that were not pushed are gone; the journal has them.
        self.at_back.extendleft(reversed(self.back.written))
        self.back.written.clear()
        self.back.notify_sent = self.back.notify_saved = 0

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "ring"):
            return
        r = self.ring
        assert ring.room(r.f) == r.nr_ents - self.outstanding >= 0
        assert ring.unanswered(r.f) == self.outstanding
        assert ring.available(r.b) == len(self.front.sent)
        assert ring.available(r.f) == len(self.back.sent)
        assert ring.room(r.b) == len(self.at_back) == ring.unanswered(r.b)
        for record, end in ((r.front, self.front), (r.back, self.back)):
            assert record["notify_sent"][0] == end.notify_sent
            assert record["notify_saved"][0] == end.notify_saved
            assert all(0 <= record[index][0] < WRAP for index in ("prod_pvt", "cons", "pushed"))
        r.memory.check()


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=60, stateful_step_count=60)
