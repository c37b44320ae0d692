"""Everything a hostile guest can do, at random and mixed. `make fuzz` has fresh seeds, other runs have always one.

A failure prints the seed, and PVDRIVERS_SEED=N plays one again.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from pvdrivers.sim import toolstack
from tests.hostile.conftest import Arena
from tests.hostile_frontend import CLOSING, INIT_WAIT, INITIALISED, Frontend, discard, indirect, request

SECONDS = 3.0


class Liar:
    """One guest without principles."""

    def __init__(self, front: Frontend, chance: random.Random) -> None:
        self.front, self.chance = front, chance
        _, grefs = front.page(6)
        self.grefs = [*grefs, front.page(readonly=True)[1][0], front.page(domid=1)[1][0], 0, 31000, 0xFFFFFFFF]
        self.acts = [*[self.batch] * 8, self.index, self.state, self.state, self.key, self.event, self.start,
                     self.grant]  # fmt: skip

    def gref(self) -> int:
        return self.chance.choice(self.grefs)

    def slot(self, abi: int) -> bytes:
        c = self.chance
        sector = c.choice([c.randrange(2100), c.getrandbits(64), 1 << 63])
        segments = [(self.gref(), c.choice([0, 0, c.randrange(256)]), c.choice([7, 7, c.randrange(256)]))
                    for _ in range(c.randrange(12))]  # fmt: skip
        kind = c.randrange(8)
        if kind == 0:
            return c.randbytes(112)
        if kind == 1:
            return discard(sector, c.choice([8, c.getrandbits(64)]), flag=c.randrange(256), abi=abi)
        if kind == 2:
            grefs = [self.gref() for _ in range(c.randrange(9))]
            return indirect(c.randrange(3), grefs, c.choice([0, 1, 20, 256, 257, 65535]), sector=sector, abi=abi)
        op = c.choice([0, 0, 1, 1, 2, 3, c.randrange(256)])
        nr = c.choice([None, c.randrange(256)])
        return request(op, segments, id=c.getrandbits(64), sector=sector, nr=nr, abi=abi)

    def batch(self) -> None:
        if self.front.rings:
            ring = self.chance.choice(self.front.rings)
            self.front.put(ring, *[self.slot(ring.abi) for _ in range(self.chance.randrange(1, 33))])

    def index(self) -> None:
        if self.front.rings:
            ring = self.chance.choice(self.front.rings)
            if self.chance.random() < 0.2:
                ring.words[self.chance.randrange(4)] = self.chance.getrandbits(32)
            else:
                ring.words[0] = (int(ring.words[2]) + self.chance.randrange(40)) & 0xFFFFFFFF

    def state(self) -> None:
        self.front.say(self.chance.choice([1, 3, 4, 5, 6, self.chance.randrange(-1, 10), "x", ""]))

    def key(self) -> None:
        name = self.chance.choice(["ring-ref", "ring-ref0", "event-channel", "multi-queue-num-queues", "protocol",
                                   "ring-page-order", "feature-persistent", "queue-0/ring-ref", "state"])  # fmt: skip
        value = self.chance.choice(["0", "1", "4", str(self.gref()), "-1", "x86_32-abi", self.chance.randbytes(9)])
        self.front.store.write(f"{self.front.front}/{name}", value)

    def event(self) -> None:
        for ring in self.front.rings:
            for _ in range(self.chance.randrange(50)):
                self.front.events.notify(ring.port)

    def grant(self) -> None:
        """One ends, one comes; the numbers go round."""
        pages = self.front.platform.pages
        gref = self.grefs[self.chance.randrange(6)]
        if gref in self.front.grefs and pages.end(gref):
            self.front.grefs.remove(gref)
            self.front.page(readonly=self.chance.random() < 0.3)

    def start(self) -> None:
        """A connection as an honest guest would make it, or nearly."""
        if len(self.front.rings) > 12:
            return
        abi, order, queues = self.chance.choice([64, 32]), self.chance.randrange(3), self.chance.randrange(1, 4)
        rings = [self.front.new_ring(order, abi, start=self.chance.choice([0, 0xFFFFFFF0])) for _ in range(queues)]
        self.front.say(self.chance.choice([CLOSING, 6, 1, 1]))
        time.sleep(self.chance.choice([0, 0.01]))
        self.front.say(1)
        time.sleep(self.chance.choice([0, 0.02]))
        self.front.say(INITIALISED, **self.front.keys_of(rings, order))
        self.front.rings[:] = rings


@pytest.mark.fuzz
def test_anything(arena: Arena) -> None:
    fresh = random.SystemRandom().getrandbits(32) if "PVDRIVERS_FUZZ_UNTIL" in os.environ else 1
    seed = int(os.environ.get("PVDRIVERS_SEED", 0)) or fresh
    chance = random.Random(seed)
    try:
        with arena.liar(memory_mib=32, be={"params": f"{arena.image()},policy={chance.choice(['map', 'copy'])}"}) as a:
            with arena.liar(f"memory:1M,policy=persistent,queues={chance.randrange(1, 4)}", memory_mib=32) as b:
                liars = [Liar(front, chance) for front in (a, b)]
                for liar in liars:
                    liar.front.wait(INIT_WAIT)
                    liar.front.connect(feature_persistent=chance.randrange(2))
                end = time.monotonic() + SECONDS
                while time.monotonic() < end:
                    chance.choice(chance.choice(liars).acts)()
                    time.sleep(chance.choice([0, 0, 0, 0.002]))
                arena.check()
                for liar in liars:  # xl block-detach --force: and all is let go of
                    toolstack.detach(arena.bed.dom0.store, liar.front.back, timeout=1.0, force=True)
                    liar.front.all_released()
    except BaseException as e:
        e.add_note(f"PVDRIVERS_SEED={seed} plays this again")
        print(f"PVDRIVERS_SEED={seed}")
        raise
