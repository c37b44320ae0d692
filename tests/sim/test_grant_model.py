"""Any order of granting, mapping, copying and cheating, against grants as one would explain them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pvdrivers import sim
from pvdrivers.invoke import invoke
from pvdrivers.platform import (
    GRANT_OP,
    OP_BETWEEN,
    OP_READONLY,
    OP_TO_GUEST,
    GNTST_bad_gntref,
    GNTST_bad_handle,
    GNTST_bad_page,
    GNTST_eagain,
    GNTST_general_error,
    GNTST_okay,
)
from pvdrivers.sim import grant_seam, toolstack
from pvdrivers.windows import view

grant_map, grant_unmap = invoke(grant_seam.grant_map), invoke(grant_seam.grant_unmap)
grant_copy = invoke(grant_seam.grant_copy)
offer, end = invoke(grant_seam.offer_grant), invoke(grant_seam.offer_end)

PERMIT, READONLY, READING, WRITING = 1, 4, 8, 16
EBUSY = 16
GREFS = [8, 9, 10]
PAGES = 1024
FRAMES = [0, 1, PAGES - 1, PAGES]  # the last is one too many
DOMIDS = [0, 5]
COPY = st.tuples(st.sampled_from(GREFS), st.none() | st.sampled_from(GREFS), st.booleans())


class NaiveEntry:
    """One grant: what the guest wrote, and who has it mapped."""

    def __init__(self) -> None:
        self.flags, self.domid, self.frame = 0, 0, 0
        self.pinned: list[tuple[int, bool]] = []  # (mapper, readonly)
        self.pinned_frame = 0

    def map(self, mapper: int, readonly: bool) -> int:
        if any(m != mapper for m, _ in self.pinned):
            return GNTST_eagain
        writable = any(not r for _, r in self.pinned)
        if not self.pinned or (not readonly and not writable):
            if self.flags & 3 != PERMIT or self.domid != 0 or (not readonly and self.flags & READONLY):
                return GNTST_general_error
            if not self.pinned:
                if self.frame >= PAGES:
                    return GNTST_bad_page
                self.pinned_frame = self.frame
            self.flags |= READING | (0 if readonly else WRITING)
        self.pinned.append((mapper, readonly))
        return GNTST_okay

    def unmap(self, mapper: int, readonly: bool) -> int:
        if (mapper, readonly) not in self.pinned:
            return GNTST_bad_handle
        self.pinned.remove((mapper, readonly))
        if not readonly and all(r for _, r in self.pinned):
            self.flags &= ~WRITING
        if not self.pinned:
            self.flags &= ~READING
        return GNTST_okay


class GrantsMachine(RuleBasedStateMachine):
    """Two mappers of dom0 and one guest, over three grefs."""

    run_dir: Path
    strict = False

    def __init__(self) -> None:
        super().__init__()
        self.mappers: list[Any] = [sim.open(self.run_dir, strict=self.strict) for _ in range(2)]
        domain = toolstack.create_domain(self.mappers[0], memory_mib=PAGES // 256)
        self.guest: Any = sim.open(self.run_dir, domain.domid, domain.token)
        self.guest.pages.reserve(len(GREFS))
        entry = [("flags", "u2"), ("domid", "u2"), ("frame", "u4")]
        self.table = view(int(self.guest.pages._ctx["grants"][0]), 64, entry)
        self.model = {gref: NaiveEntry() for gref in GREFS}
        self.handles: list[tuple[int, int, bool, np.ndarray]] = []
        for mapper in self.mappers:
            mapper.prepare(domain.domid)

    def teardown(self) -> None:
        for platform in [self.guest, *self.mappers]:
            platform.close()

    def _op(self, gref: int, flags: int) -> np.ndarray:
        ops = np.zeros(1, GRANT_OP)
        ops["gref"], ops["domid"], ops["flags"] = gref, self.guest.domid, flags
        return ops

    @rule(gref=st.sampled_from(GREFS), frame=st.sampled_from(FRAMES), domid=st.sampled_from(DOMIDS),
          readonly=st.booleans())  # fmt: skip
    def offer(self, gref: int, frame: int, domid: int, readonly: bool) -> None:
        entry = self.model[gref]
        result = offer(self.guest.pages.ctx, gref, frame, domid | readonly << 16)
        if frame >= PAGES:
            assert result < 0
        elif entry.flags & (READING | WRITING):
            assert result == -EBUSY
        else:
            assert result == 0
            entry.flags, entry.domid, entry.frame = PERMIT | (READONLY if readonly else 0), domid, frame

    @rule(gref=st.sampled_from(GREFS))
    def end(self, gref: int) -> None:
        entry = self.model[gref]
        result = end(self.guest.pages.ctx, gref)
        if entry.flags & (READING | WRITING):
            assert result == -EBUSY
        else:
            assert result == 0
            entry.flags = 0

    @rule(gref=st.sampled_from(GREFS), flags=st.sampled_from([0, PERMIT, PERMIT | READONLY, 2, 3]),
          domid=st.sampled_from(DOMIDS), frame=st.sampled_from(FRAMES))  # fmt: skip
    def cheat(self, gref: int, flags: int, domid: int, frame: int) -> None:
        """The guest writes what it likes, whether the entry is in use or not."""
        self.table[gref] = (flags, domid, frame)
        entry = self.model[gref]
        entry.flags, entry.domid, entry.frame = flags, domid, frame

    @rule(who=st.integers(0, 1), gref=st.sampled_from(GREFS), readonly=st.booleans())
    def map(self, who: int, gref: int, readonly: bool) -> None:
        ops = self._op(gref, OP_READONLY if readonly else 0)
        grant_map(self.mappers[who].grants.ctx, ops.ctypes.data, 1)
        assert ops["status"][0] == self.model[gref].map(who, readonly)
        if ops["status"][0] == GNTST_okay:
            self.handles.append((who, gref, readonly, ops))
            # The page is where the map says: what we see there is what the guest sees in its memory.
            frame = self.model[gref].pinned_frame
            ours = self.guest.pages._base + frame * 4096
            ctypes.memset(ours, gref + frame % 100, 16)
            assert ctypes.string_at(int(ops["address"][0]), 16) == bytes([gref + frame % 100]) * 16

    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        if not self.handles:
            return
        who, gref, readonly, ops = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        grant_unmap(self.mappers[who].grants.ctx, ops.ctypes.data, 1)
        assert ops["status"][0] == self.model[gref].unmap(who, readonly) == GNTST_okay

    @rule(who=st.integers(0, 1), gref=st.sampled_from(GREFS), readonly=st.booleans(), slot=st.integers(0, 3))
    def unmap_nonsense(self, who: int, gref: int, readonly: bool, slot: int) -> None:
        """A handle that could be one, but is not."""
        if any(m == who and g == gref and r == readonly for m, g, r, _ in self.handles) and slot == 0:
            return
        ops = self._op(gref, 0)
        ops["handle"] = 0x5A << 48 | slot << 33 | readonly << 32 | gref
        assert grant_unmap(self.mappers[who].grants.ctx, ops.ctypes.data, 1) == 1
        assert ops["status"][0] == GNTST_bad_handle

    @rule(who=st.integers(0, 1), copies=st.lists(COPY, min_size=1, max_size=5))
    def copy(self, who: int, copies: list[tuple[int, int | None, bool]]) -> None:
        """A batch of copies, each to or from memory or, where there is another gref, that page."""
        ops, local = np.zeros(len(copies), GRANT_OP), np.arange(len(copies) * 32, dtype=np.uint8)
        memory = {i: bytes(local[i * 32 : i * 32 + 32]) for i in range(len(copies))}
        pages = {frame: self._page(frame) for frame in FRAMES[:-1]}
        expected = []
        for i, (gref, other, to_guest) in enumerate(copies):
            ops[i]["gref"], ops[i]["domid"], ops[i]["length"], ops[i]["offset"] = gref, self.guest.domid, 32, 100
            ops[i]["flags"] = (OP_TO_GUEST if to_guest else 0) | (0 if other is None else OP_BETWEEN)
            there = local.ctypes.data + i * 32 if other is None else other | 100 << 32 | self.guest.domid << 48
            ops[i]["address"] = there
            expected.append(self._copy(who, gref, other, to_guest, memory, pages, i))
        failed = grant_copy(self.mappers[who].grants.ctx, ops.ctypes.data, len(ops))
        assert ops["status"].tolist() == expected and failed == sum(status != GNTST_okay for status in expected)
        assert local.tobytes() == b"".join(memory.values())
        assert pages == {frame: self._page(frame) for frame in pages}

    def _page(self, frame: int) -> bytes:
        return ctypes.string_at(self.guest.pages._base + frame * 4096 + 100, 32)

    def _copy(self, who: int, gref: int, other: int | None, to_guest: bool, memory: dict[int, bytes],
              pages: dict[int, bytes], i: int) -> int:  # fmt: skip
        """One at a time, each with its own pins."""
        entry = self.model[gref]
        status = entry.map(who, not to_guest)
        if status != GNTST_okay:
            return status
        beside, there = (memory, i) if other is None else (pages, 0)
        if other is not None:
            status = self.model[other].map(who, to_guest)
            there = self.model[other].pinned_frame
        if status == GNTST_okay:
            if to_guest:
                pages[entry.pinned_frame] = beside[there]
            else:
                beside[there] = pages[entry.pinned_frame]
            if other is not None:
                self.model[other].unmap(who, to_guest)
        entry.unmap(who, not to_guest)
        return status

    @rule(who=st.integers(0, 1), gref=st.integers(32768, 2**32 - 1))
    def map_beyond(self, who: int, gref: int) -> None:
        ops = self._op(gref, 0)
        assert grant_map(self.mappers[who].grants.ctx, ops.ctypes.data, 1) == 1
        assert ops["status"][0] == GNTST_bad_gntref

    @rule(who=st.integers(0, 1))
    def die(self, who: int) -> None:
        """A mapper's process ends; another takes its place."""
        self.mappers[who].hypercalls.close()  # first, as death has it: its pins are still there
        self.mappers[who].close()
        self.mappers[who] = sim.open(self.run_dir, strict=self.strict)
        self.mappers[who].prepare(self.guest.domid)
        self.handles = [h for h in self.handles if h[0] != who]
        for entry in self.model.values():
            if any(m == who for m, _ in entry.pinned):
                entry.pinned = []
                entry.flags &= ~(READING | WRITING)

    @invariant()
    def entries_agree(self) -> None:
        for gref, entry in self.model.items():
            assert self.table["flags"][gref] == entry.flags


@pytest.mark.parametrize("strict", [False, True])
def test_grants_against_the_model(run_dir: Path, strict: bool) -> None:
    machine = type("Machine", (GrantsMachine,), {"run_dir": run_dir, "strict": strict})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=40, suppress_health_check=list(HealthCheck))
    )
