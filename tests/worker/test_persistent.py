"""The cache of persistent grants against a dictionary and a list by age."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvdrivers.worker.persistent import evict, insert, lookup
from tests.worker.bed import by_age, give_back, new_cache

FOREVER = (1 << 63) - 1
grefs = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF])


class Cache(RuleBasedStateMachine):
    """gref -> [address, handle, users, last used], the least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, list[int]] = {}
        self.index: dict[int, int] = {}
        self.now = 1
        self.handle = 0

    @initialize(bound=st.sampled_from([0, 1, 2, 3, 8]), heads=st.sampled_from([1, 2, 16]))
    def begin(self, bound: int, heads: int) -> None:
        self.bound = bound
        self.cache, self.memory = new_cache(bound, heads) if bound else no_entries(heads)
        self.ca = self.cache.ctypes.data

    @rule(by=st.integers(0, 5))
    def time_passes(self, by: int) -> None:
        self.now += by

    @rule(gref=grefs)
    def use(self, gref: int) -> None:
        entry = int(lookup(self.ca, gref, self.now))
        if gref not in self.model:
            assert entry == -1
            self.keep(gref)
            return
        assert entry == self.index[gref]
        address, handle, users, _ = self.model.pop(gref)
        self.model[gref] = [address, handle, users + 1, self.now]

    def keep(self, gref: int) -> None:
        self.handle += 1
        address, handle = 0x1000 * self.handle, 1 << 40 | self.handle
        entry = int(insert(self.ca, gref, address, handle, self.now))
        if len(self.model) == self.bound:
            assert entry == -1
            return
        assert 0 <= entry < self.bound and entry not in self.index.values()
        self.model[gref] = [address, handle, 1, self.now]
        self.index[gref] = entry

    @precondition(lambda self: any(v[2] for v in self.model.values()))
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        gref = data.draw(st.sampled_from([g for g, v in self.model.items() if v[2]]))
        give_back(self.ca, self.index[gref])
        self.model[gref][2] -= 1

    @rule(age=st.one_of(st.none(), st.integers(0, 8)))
    def evict(self, age: int | None) -> None:
        since = FOREVER if age is None else self.now - age
        idle = [g for g, v in self.model.items() if v[2] == 0 and v[3] < since]
        got = int(evict(self.ca, since))
        if not idle:
            assert got == -1
            return
        assert got == self.model.pop(idle[0])[1]
        del self.index[idle[0]]

    @invariant()
    def as_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        found = by_age(self.cache)
        assert [int(e["gref"]) for _, e in found] == list(reversed(self.model))
        for index, e in found:
            gref = int(e["gref"])
            assert index == self.index[gref]
            assert [int(e[f]) for f in ("address", "handle", "users", "last_used")] == self.model[gref]
        for memory in self.memory:
            memory.check()

    def teardown(self) -> None:
        """Everything that was put in comes out, once."""
        if not hasattr(self, "cache"):
            return
        for gref, values in self.model.items():
            for _ in range(values[2]):
                give_back(self.ca, self.index[gref])
        handles = [int(evict(self.ca, FOREVER)) for _ in self.model]
        assert handles == [v[1] for v in self.model.values()]
        assert int(evict(self.ca, FOREVER)) == -1


def no_entries(heads: int) -> tuple[np.ndarray, list[Any]]:
    """A cache that may keep nothing."""
    cache, memory = new_cache(1, heads)
    cache[0]["bound"], cache[0]["free"] = 0, -1
    return cache, memory


TestCache = Cache.TestCase
