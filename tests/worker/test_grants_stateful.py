"""acquire and release in any order: every page that was had is let go of once, and calls of the seam are few."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pvdrivers.platform import GRANT_OP
from pvdrivers.worker.cache import HELD_PERSISTENT, drop_cache
from pvdrivers.worker.records import POLICY_COPY, POLICY_MAP, POLICY_PERSISTENT
from tests.worker.bed import BAD_GNTREF, PAGE, Bed, Segment

GREFS, SLOTS, MAX_OPS, BOUNCE, BOUND = 12, 8, 8, 300, 6
segment = st.builds(
    lambda gref, first, last: (gref, first * 512, (max(first, last) - first + 1) * 512),
    st.integers(0, GREFS),  # the last is none of the guest's
    st.sampled_from([0, 0, 0, 3, 7]),
    st.sampled_from([7, 7, 7, 4, 0]),
)
request = st.tuples(st.lists(segment, max_size=MAX_OPS), st.booleans(), st.booleans())


def merged(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours in memory as one."""
    out: list[tuple[int, int]] = []
    for base, length in parts:
        if out and out[-1][0] + out[-1][1] == base:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((base, length))
    return out


def batches(sizes: list[int]) -> int:
    """How many batches of MAX_OPS hold these requests, in order and each in one."""
    n = left = 0
    for size in filter(None, sizes):
        if size > left:
            n, left = n + 1, MAX_OPS
        left -= size
    return n


class Grants(RuleBasedStateMachine):
    """Requests of one ring, some refused, that come and go in any order."""

    policy = POLICY_MAP
    bounce = BOUNCE
    drops = 0  # calls that a cache which goes may take

    @initialize()
    def begin(self) -> None:
        self.bed = Bed(self.policy, grefs=GREFS, slots=SLOTS, max_ops=MAX_OPS, bounce=self.bounce, bound=BOUND)
        self.free = list(range(SLOTS))
        self.flying: dict[int, tuple[list[Segment], bool]] = {}
        self.now = 0
        self.has_block = -1

    @rule(gref=st.integers(0, GREFS - 1), refused=st.booleans())
    def guest_changes_its_mind(self, gref: int, refused: bool) -> None:
        self.bed.refused[gref] = BAD_GNTREF if refused else 0

    def bad(self, gref: int) -> bool:
        return gref >= GREFS or self.bed.refused[gref] != 0

    @rule(requests=st.lists(request, min_size=1, max_size=SLOTS))
    def a_pass(self, requests: list[tuple[list[Segment], bool, bool]]) -> None:
        self.now += 1
        self.bed.worker[0]["now"] = self.now
        slots = []
        for segments, to_guest, block in requests[: len(self.free)]:
            block = block and self.has_block < 0 and self.bed.worker[0]["blocks_n"] == 1
            if not self.bed.prepare(self.free[-1], segments, to_guest, block=block):
                break
            slots.append(self.free.pop())
            self.has_block = slots[-1] if block else self.has_block
            self.flying[slots[-1]] = (segments, to_guest)
        kept = set(self.bed.cached()) if self.policy == POLICY_PERSISTENT else set()
        before = self.bed.calls()
        self.bed.acquire(slots)
        self.look_at(slots, kept)
        self.took_calls(slots, {kind: n - before[kind] for kind, n in self.bed.calls().items()}, kept)

    def took_calls(self, slots: list[int], calls: dict[str, int], kept: set[int]) -> None:
        """What it took: a request's pages are in one batch, and no batch is left half empty for nothing."""
        assert calls == {"map": batches([len(self.flying[s][0]) for s in slots]), "unmap": 0, "copy": 0}

    def look_at(self, slots: list[int], kept: set[int]) -> None:
        for slot in slots:
            segments, to_guest = self.flying[slot]
            lacking = [g for g, _, _ in segments if self.bad(g) and g not in kept]
            if self.policy == POLICY_COPY and to_guest:
                lacking = []  # not looked at before there is something to copy
            failed = bool(self.bed.reqs[slot]["failed"] != 0)
            assert failed or not lacking
            # A pass that does not fit into one batch: what an earlier batch mapped may have made a page go that was
            # kept until then, and the guest refuses to give it again.
            assert not failed or any(self.bad(g) for g, _, _ in segments)
            if not failed:
                self.usable(slot)

    def usable(self, slot: int) -> None:
        """The iovecs are the guest's pages, in order."""
        segments, _ = self.flying[slot]
        start = self.bed.pages.ctypes.data
        assert self.bed.iovecs(slot) == merged([(start + g * PAGE + at, n) for g, at, n in segments])

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def some_end(self, data: st.DataObject) -> None:
        self.end(data.draw(st.lists(st.sampled_from(sorted(self.flying)), min_size=1, unique=True)))

    def end(self, slots: list[int]) -> None:
        own = sum(self.own_pages(slot) for slot in slots)
        before = self.bed.calls()["unmap"]
        self.bed.release(*slots)
        calls = self.bed.calls()["unmap"] - before
        assert 0 <= calls - -(-own // MAX_OPS) <= self.drops, "one call for all of them, or few full ones"
        for slot in slots:
            assert self.bed.reqs[slot]["held"] == 0 and self.bed.reqs[slot]["block"] == 0
            if slot == self.has_block:
                self.has_block = -1
            del self.flying[slot]
            self.free.append(slot)

    def own_pages(self, slot: int) -> int:
        """Pages that are mapped for this request alone."""
        return sum(handle != -1 for handle in self.handles(slot, len(self.flying[slot][0])))

    def expected(self) -> np.ndarray:
        """How often each page should be mapped now."""
        want = np.zeros(GREFS, np.int32)
        for slot, (segments, _) in self.flying.items():
            handles = self.handles(slot, len(segments))
            for (gref, _, _), handle in zip(segments, handles):
                if handle != -1:
                    want[gref] += 1
        return want

    def ops(self, slot: int, n: int) -> np.ndarray:
        """How each page of a request is held."""
        if slot != self.has_block:
            return self.bed.held[slot][:n]
        at = int(self.bed.reqs[slot]["ops"]) - self.bed.block.ctypes.data
        return self.bed.block[at : at + 32 * n].view(GRANT_OP)

    def handles(self, slot: int, n: int) -> list[int]:
        return [int(op["handle"]) for op in self.ops(slot, n)]

    @invariant()
    def nothing_is_undone_twice(self) -> None:
        if hasattr(self, "bed"):
            self.bed.check()
            self.balance()
            assert self.bed.worker[0]["blocks_n"] == (1 if self.has_block < 0 else 0)

    def balance(self) -> None:
        assert (self.bed.mapped == self.expected()).all()

    def teardown(self) -> None:
        if hasattr(self, "bed"):
            if self.flying:
                self.end(list(self.flying))
            self.bed.check()
            self.at_rest()

    def at_rest(self) -> None:
        assert not self.bed.mapped.any()
        assert int(self.bed.stats[0]["grants_mapped"]) == self.bed.counts[0]["maps"]


class Persistent(Grants):
    """What was mapped stays, up to a bound."""

    policy = POLICY_PERSISTENT

    def balance(self) -> None:
        cached = self.bed.cached()
        assert len(cached) <= BOUND
        assert int(self.bed.stats[0]["persistent_held"]) == len(cached)
        assert all(self.bed.mapped[g] >= 1 for g in cached)
        users = sum(cached.values())
        own = int(self.bed.mapped.sum()) - len(cached)
        good = sum(h != -1 for s, (segments, _) in self.flying.items() for h in self.handles(s, len(segments)))
        assert users + own == good
        assert not self.bed.readonly.any()  # a page is for reading and writing, whoever comes first

    def took_calls(self, slots: list[int], calls: dict[str, int], kept: set[int]) -> None:
        """Pages that are kept need none; what goes to make room, at most one a batch."""
        missed = [sum(gref not in kept for gref, _, _ in self.flying[slot][0]) for slot in slots]
        assert calls["copy"] == 0
        assert calls["map"] <= batches([len(self.flying[s][0]) for s in slots])
        assert (calls["map"] > 0) == (sum(missed) > 0)
        assert calls["unmap"] <= calls["map"]

    def own_pages(self, slot: int) -> int:
        held = self.ops(slot, len(self.flying[slot][0]))
        return sum(op["handle"] != -1 and not op["flags"] & HELD_PERSISTENT for op in held)

    @rule(age=st.integers(0, 3), room=st.integers(1, BOUND + 1))
    def idle_pages_go(self, age: int, room: int) -> None:
        ops = np.zeros(room, GRANT_OP)
        before, calls = self.bed.cached(), self.bed.calls()["unmap"]
        n = int(drop_cache(self.bed.wa, self.bed.ra, self.now - age, ops.ctypes.data, room))
        after = self.bed.cached()
        assert len(before) - len(after) == n
        assert self.bed.calls()["unmap"] - calls == -(-n // room)
        assert all(users == 0 for gref, users in before.items() if gref not in after)

    def at_rest(self) -> None:
        cached = self.bed.cached()
        assert not any(cached.values())
        assert [int(g) for g in np.flatnonzero(self.bed.mapped)] == sorted(cached)
        assert self.bed.mapped.max(initial=0) <= 1
        op = np.zeros(1, GRANT_OP)
        assert int(drop_cache(self.bed.wa, self.bed.ra, 1 << 62, op.ctypes.data, 1)) == len(cached)
        assert not self.bed.mapped.any()
        self.bed.check()


class Copy(Grants):
    """Nothing is ever mapped."""

    policy = POLICY_COPY

    def usable(self, slot: int) -> None:
        segments, to_guest = self.flying[slot]
        places = [int(op["address"]) for op in self.ops(slot, len(segments))]
        assert self.bed.iovecs(slot) == merged([(at, n) for at, (_, _, n) in zip(places, segments)])
        if not to_guest:
            for at, (gref, offset, n) in zip(places, segments):
                index = at - self.bed.bounce.ctypes.data
                assert (self.bed.bounce[index : index + n] == self.bed.pages[gref, offset : offset + n]).all()

    def took_calls(self, slots: list[int], calls: dict[str, int], kept: set[int]) -> None:
        """All writes of a pass are one stream of copies."""
        writes = sum(len(segments) for segments, to_guest in map(self.flying.__getitem__, slots) if not to_guest)
        assert calls == {"map": 0, "unmap": 0, "copy": -(-writes // MAX_OPS)}

    def own_pages(self, slot: int) -> int:
        return 0

    def end(self, slots: list[int]) -> None:
        self.read_back(slots)
        super().end(slots)

    def read_back(self, slots: list[int]) -> None:
        """The data of reads: into the guest's pages, and nowhere beside them. The store may have failed, too."""
        want = self.bed.pages.copy()
        reads, copies = [], 0
        for slot in slots:
            segments, to_guest = self.flying[slot]
            self.bed.reqs[slot]["res"] = -5 if slot % 4 == 3 else 0
            if not to_guest or slot % 4 == 3 or self.bed.reqs[slot]["bounced"] == 0:
                continue
            reads.append(slot)
            for k, (op, (gref, offset, n)) in enumerate(zip(self.ops(slot, len(segments)), segments)):
                index = int(op["address"]) - self.bed.bounce.ctypes.data
                self.bed.bounce[index : index + n] = 100 + 8 * slot + k
                copies += 1
                if not self.bad(gref):
                    want[gref, offset : offset + n] = 100 + 8 * slot + k
        before, failed = self.bed.calls()["copy"], self.bed.reqs["failed"].copy()
        self.bed.copy_back(*slots)
        assert (self.bed.pages == want).all()
        assert self.bed.calls()["copy"] - before == -(-copies // MAX_OPS)
        for slot in slots:
            if slot in reads:
                failed[slot] = BAD_GNTREF if any(self.bad(g) for g, _, _ in self.flying[slot][0]) else 0
        assert (self.bed.reqs["failed"] == failed).all()

    def balance(self) -> None:
        assert self.bed.counts[0]["maps"] == 0
        places = [int(op["address"]) for s, (segs, _) in self.flying.items() for op in self.ops(s, len(segs))]
        assert len(set(places)) == len(places)
        assert self.bed.worker[0]["bounce_n"] == BOUNCE - len(places)
        assert self.bed.worker[0]["bounce_reserved"] == 0

    def at_rest(self) -> None:
        assert self.bed.worker[0]["bounce_n"] == BOUNCE


class Limited(Copy):
    """Xen has room for a few pages: what is mapped before it is used up stays right, and all else is copied."""

    bounce = SLOTS * MAX_OPS * 9
    drops = 1

    @initialize(policy=st.sampled_from([POLICY_MAP, POLICY_PERSISTENT]), room=st.integers(0, 12))
    def begin(self, policy: int, room: int) -> None:  # type: ignore[override]
        self.policy = policy
        Grants.begin(self)
        self.bed.counts[0]["room"] = room
        self.alerts = 0

    def look_at(self, slots: list[int], kept: set[int]) -> None:
        for slot in slots:
            segments, to_guest = self.flying[slot]
            req = self.bed.reqs[slot]
            refused = any(self.bad(gref) for gref, _, _ in segments)
            if req["bounced"]:
                assert req["bounced"] == len(segments)
                assert bool(req["failed"]) == (refused and not to_guest)
            else:
                assert refused or not req["failed"], "nothing fails for want of room"
                assert req["failed"] or not [g for g, _, _ in segments if self.bad(g) and g not in kept]
            if not req["failed"] and req["bounced"]:
                super().usable(slot)
            elif not req["failed"]:
                Grants.usable(self, slot)

    def took_calls(self, slots: list[int], calls: dict[str, int], kept: set[int]) -> None:
        writes = sum(len(self.flying[s][0]) for s in slots if self.bed.reqs[s]["bounced"] and not self.flying[s][1])
        assert calls["copy"] == -(-writes // MAX_OPS)

    def own_pages(self, slot: int) -> int:
        if self.bed.reqs[slot]["held"] == 0 or self.bed.reqs[slot]["bounced"]:
            return 0
        return Persistent.own_pages(self, slot)  # type: ignore[arg-type]

    def balance(self) -> None:
        ring, stats = self.bed.ring[0], self.bed.stats[0]
        cached = self.bed.cached() if ring["cache"] else {}
        assert int(self.bed.mapped.sum()) == len(cached) + sum(map(self.own_pages, self.flying))
        limited = self.bed.counts[0]["no_room"] > 0
        self.alerts += self.bed.alerts()
        if ring["limit"]:
            assert limited and ring["policy"] == POLICY_COPY and self.alerts == 1
            assert all(cached.values()), "nothing is kept for nobody"
        else:
            # A request that lacks room and a page is refused, whatever comes first.
            assert ring["policy"] == self.policy and self.alerts == 0 and stats["fallbacks"] == 0
        bounced = sum(int(self.bed.reqs[slot]["bounced"]) for slot in self.flying)
        assert self.bed.worker[0]["bounce_n"] == self.bounce - bounced
        assert self.bed.worker[0]["bounce_reserved"] == 0

    def at_rest(self) -> None:
        assert self.bed.worker[0]["bounce_n"] == self.bounce
        if self.bed.ring[0]["limit"] or self.policy == POLICY_MAP:
            assert not self.bed.mapped.any()


TestMap = Grants.TestCase
TestPersistent = Persistent.TestCase
TestCopy = Copy.TestCase
TestLimited = Limited.TestCase
for case in (TestMap, TestPersistent, TestCopy, TestLimited):
    case.settings = settings(stateful_step_count=25)
