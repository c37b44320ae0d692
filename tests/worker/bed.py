"""A worker's records without a worker, and a seam that counts: what is mapped now, and what was undone twice."""

from __future__ import annotations

import ctypes
import os
import weakref
from itertools import pairwise
from typing import Any

import numpy as np

from pvdrivers.iovec import IOVEC
from pvdrivers.platform import (
    GRANT_OP,
    OP_READONLY,
    OP_TO_GUEST,
    SEAM,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_no_space,
)
from pvdrivers.worker import grants, pools
from pvdrivers.worker.cache import purge_cache
from pvdrivers.worker.persistent import ENTRY, PERSISTENT_CACHE, format_cache, put_back
from pvdrivers.worker.records import (
    BLOCK_IOV_AT,
    BLOCK_OPS_AT,
    BLOCK_SIZE,
    POLICY_COPY,
    POLICY_PERSISTENT,
    REQ,
    RING,
    RING_ACTIVE,
    SEGMENT,
    STATS,
    WORKER,
)
from rings.atomics import copy_bytes, i64, records
from rings.jit import address_of, kernel, seam_function
from tests.rings.guard import Guarded

PAGE = 4096
DOMID = 7
BAD_GNTREF = -3
Segment = tuple[int, int, int]  # gref, offset, length
HANDLES = 1 << 16
STALE = 0x5A5A5A5A5A  # what must never be used: the handle and the address of a page that could not be had

COUNTS = np.dtype(
    [
        ("pages", "i8"),  # address of the granting domain's pages
        ("n", "i8"),
        ("refused", "i8"),  # address of i2[n]: the status that an operation on it gets
        ("mapped", "i8"),  # address of i4[n]: how often it is mapped now
        ("readonly", "i8"),  # address of i4[n]: how often it was mapped read-only
        ("handles", "i8"),  # address of i4[HANDLES]: gref + 1 of a handle in use
        ("next", "i8"),
        ("bad", "i8"),  # handles given back that were not in use
        ("map_calls", "i8"),
        ("unmap_calls", "i8"),
        ("copy_calls", "i8"),
        ("largest", "i8"),  # operations in one call
        ("maps", "i8"),
        ("room", "i8"),  # pages that may be mapped at once
        ("live", "i8"),  # ... and are
        ("no_room", "i8"),  # maps that this has refused
        ("no_room_status", "i8"),  # ... and how
        ("watch", "i8"),  # address of a u4, or 0: what is there
        ("watched", "i8"),  # ... when something was unmapped last
    ],
    align=True,
)
_I2, _I4, _U4 = np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.uint32)


@kernel
def _admit(ctx_at: int, op_address: int) -> int:
    ctx = records(ctx_at, 1, COUNTS)[0]
    op = records(op_address, 1, GRANT_OP)[0]
    gref = i64(op["gref"])
    if i64(op["domid"]) != DOMID:
        return i64(GNTST_bad_domain)
    if gref >= ctx["n"]:
        return i64(GNTST_bad_gntref)
    return i64(records(ctx["refused"], ctx["n"], _I2)[gref])


@kernel
def _called(ctx_at: int, n: int) -> None:
    ctx = records(ctx_at, 1, COUNTS)[0]
    if n > ctx["largest"]:
        ctx["largest"] = n


@seam_function
def counting_map(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_map."""
    ctx = records(ctx_at, 1, COUNTS)[0]
    ctx["map_calls"] += 1
    _called(ctx_at, n)
    failed = i64(0)
    for k in range(n):
        op = records(ops + k * 32, 1, GRANT_OP)[0]
        status = _admit(ctx_at, ops + k * 32)
        if ctx["live"] >= ctx["room"]:
            status = i64(ctx["no_room_status"])
            ctx["no_room"] += 1
        op["status"] = status
        op["handle"], op["address"] = STALE, STALE
        if status != 0:
            failed += 1
            continue
        gref = i64(op["gref"])
        op["handle"], op["address"] = ctx["next"], ctx["pages"] + gref * PAGE
        records(ctx["handles"], HANDLES, _I4)[ctx["next"]] = gref + 1
        records(ctx["mapped"], ctx["n"], _I4)[gref] += 1
        if i64(op["flags"]) & OP_READONLY != 0:
            records(ctx["readonly"], ctx["n"], _I4)[gref] += 1
        ctx["next"] += 1
        ctx["maps"] += 1
        ctx["live"] += 1
    return failed


@seam_function
def counting_unmap(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_unmap."""
    ctx = records(ctx_at, 1, COUNTS)[0]
    ctx["unmap_calls"] += 1
    if ctx["watch"] != 0:
        ctx["watched"] = i64(records(ctx["watch"], 1, _U4)[0])
    _called(ctx_at, n)
    failed = i64(0)
    for k in range(n):
        op = records(ops + k * 32, 1, GRANT_OP)[0]
        handle = op["handle"]
        held = i64(0)
        if handle >= 0 and handle < HANDLES:
            held = i64(records(ctx["handles"], HANDLES, _I4)[handle])
        if held == 0:
            ctx["bad"] += 1
            failed += 1
            continue
        records(ctx["handles"], HANDLES, _I4)[handle] = 0
        records(ctx["mapped"], ctx["n"], _I4)[held - 1] -= 1
        ctx["live"] -= 1
    return failed


@seam_function
def counting_copy(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_copy."""
    ctx = records(ctx_at, 1, COUNTS)[0]
    ctx["copy_calls"] += 1
    _called(ctx_at, n)
    failed = i64(0)
    for k in range(n):
        op = records(ops + k * 32, 1, GRANT_OP)[0]
        status = _admit(ctx_at, ops + k * 32)
        op["status"] = status
        if status != 0:
            failed += 1
            continue
        granted = ctx["pages"] + i64(op["gref"]) * PAGE + i64(op["offset"])
        if i64(op["flags"]) & OP_TO_GUEST != 0:
            copy_bytes(granted, op["address"], i64(op["length"]))
        else:
            copy_bytes(op["address"], granted, i64(op["length"]))
    return failed


@kernel
def reserve(wa: int, ra: int, pages: int) -> bool:
    return pools.reserve_bounce(wa, ra, pages)


@kernel
def pop_block(wa: int, ra: int) -> int:
    return pools.pop_block(wa, ra)


@kernel
def give_back(ca: int, index: int) -> None:
    put_back(ca, index)


@kernel
def try_to_map(wa: int, ra: int) -> None:
    grants.try_to_map(wa, ra)


@kernel
def purge(wa: int, ra: int) -> None:
    purge_cache(wa, ra)


def new_cache(bound: int, heads: int) -> tuple[np.ndarray, list[Guarded]]:
    """A formatted PERSISTENT_CACHE, and what must live as long."""
    memory = [Guarded(heads * 4), Guarded(bound * ENTRY.itemsize)]
    cache = np.zeros(1, PERSISTENT_CACHE)
    cache[0]["heads"], cache[0]["n_heads"] = memory[0].address, heads
    cache[0]["entries"], cache[0]["bound"] = memory[1].address, bound
    memory[1].bytes[:] = 0xEE
    format_cache(cache.ctypes.data)
    return cache, memory


def by_age(cache: np.ndarray) -> list[tuple[int, Any]]:
    """(index, ENTRY) of what is in a cache, the newest first; both ways through the list."""
    c = cache[0]
    entries = np.frombuffer((ctypes.c_char * (int(c["bound"]) * ENTRY.itemsize)).from_address(int(c["entries"])), ENTRY)
    out = []
    index, newer = int(c["newest"]), -1
    while index >= 0:
        assert entries[index]["newer"] == newer
        out.append((index, entries[index]))
        assert len(out) <= len(entries)
        index, newer = int(entries[index]["older"]), index
    assert int(c["oldest"]) == newer and int(c["used"]) == len(out)
    return out


class Bed:
    """One worker, one ring of one policy, `grefs` pages of a guest, `slots` requests."""

    def __init__(
        self, policy: int, *, grefs: int = 12, slots: int = 8, max_ops: int = 8, bounce: int = 16, bound: int = 6,
        blocks: int = 1,
    ) -> None:  # fmt: skip
        self.policy, self.max_ops, self.n_blocks = policy, max_ops, blocks
        self._keep: list[Any] = []
        self.pages = self._bytes(grefs * PAGE).reshape(grefs, PAGE)
        self.pages[:] = np.arange(grefs, dtype=np.uint8)[:, None] + 1
        self.refused, self.mapped = np.zeros(grefs, np.int16), np.zeros(grefs, np.int32)
        self.readonly, self.handles = np.zeros(grefs, np.int32), np.zeros(HANDLES, np.int32)
        self.counts = np.zeros(1, COUNTS)
        for name in ("pages", "refused", "mapped", "readonly", "handles"):
            self.counts[0][name] = getattr(self, name).ctypes.data
        self.counts[0]["n"], self.counts[0]["room"] = grefs, HANDLES
        self.counts[0]["no_room_status"] = GNTST_no_space
        seam = np.zeros(1, SEAM)
        seam["grant_ctx"] = self.counts.ctypes.data
        for name, fn in (("map", counting_map), ("unmap", counting_unmap), ("copy", counting_copy)):
            seam[f"grant_{name}"] = address_of(fn)
        self.ring, self.stats = np.zeros(1, RING), np.zeros(1, STATS)
        self.worker = np.zeros(1, WORKER)
        self._fill_worker(seam, slots, bounce)
        self._fill_ring(bound)
        self.reqs = np.zeros(slots, REQ)
        self.segs = np.zeros((slots, max_ops), SEGMENT)
        self.held = np.zeros((slots, max_ops), GRANT_OP)
        self.iovs = np.zeros((slots, max_ops), IOVEC)

    def _bytes(self, size: int) -> np.ndarray:
        memory = Guarded(size)
        self._keep.append(memory)
        return memory.bytes

    def _fill_worker(self, seam: np.ndarray, slots: int, bounce: int) -> None:
        self._keep.append(seam)
        w = self.worker[0]
        w["seam"], w["rings"] = seam.ctypes.data, self.ring.ctypes.data
        w["max_rings"] = w["top_ring"] = 1
        self.alert_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self.alert_fd)
        w["alert_fd"] = self.alert_fd
        self._bytes(self.max_ops * GRANT_OP.itemsize)
        w["ops"], w["max_ops"] = self._keep[-1].address, self.max_ops
        self.batch = self._keep[-1].bytes
        self._bytes(self.max_ops * 8)
        w["owners"] = self._keep[-1].address
        self._bytes(slots * 8)
        w["pass_reqs"], w["budget"] = self._keep[-1].address, slots
        self.pass_reqs = self._keep[-1].bytes.view(np.int64)
        self.bounce = self._bytes(bounce * PAGE)
        free = self._bytes(bounce * 4).view(np.int32)
        free[:] = np.arange(bounce - 1, -1, -1)
        w["bounce"], w["bounce_free"], w["bounce_n"] = self.bounce.ctypes.data, free.ctypes.data, bounce
        self.block = self._bytes(self.n_blocks * BLOCK_SIZE)
        blocks = self._bytes(self.n_blocks * 8).view(np.int64)
        blocks[:] = self.block.ctypes.data + np.arange(self.n_blocks) * BLOCK_SIZE
        w["blocks_free"], w["blocks_n"] = blocks.ctypes.data, self.n_blocks

    def _fill_ring(self, bound: int) -> None:
        ring = self.ring[0]
        ring["state"], ring["worker"], ring["domid"] = RING_ACTIVE, self.wa, DOMID
        ring["policy"], ring["stats"] = self.policy, self.stats.ctypes.data
        ring["keep_ns"], ring["pages_limit"] = 60_000_000_000, 1 << 40
        if self.policy == POLICY_PERSISTENT:
            self.cache, memory = new_cache(bound, 4)
            self._keep += memory
            ring["cache"] = self.cache.ctypes.data

    @property
    def wa(self) -> int:
        return int(self.worker.ctypes.data)

    @property
    def ra(self) -> int:
        return int(self.ring.ctypes.data)

    def qa(self, slot: int) -> int:
        """The address of a REQ."""
        return int(self.reqs[slot : slot + 1].ctypes.data)

    def prepare(self, slot: int, segments: list[tuple[int, int, int]], to_guest: bool, *, block: bool = False) -> bool:
        """Fill in a request as blkback's _prepare and plan do; False if it has to wait for bounce pages."""
        if self.ring[0]["policy"] == POLICY_COPY and not reserve(self.wa, self.ra, self.max_ops):
            return False
        r = self.reqs[slot]
        r["ring"], r["to_guest"], r["nseg"] = self.ra, to_guest, len(segments)
        r["failed"] = r["held"] = r["bounced"] = r["n_iov"] = r["pages"] = 0
        r["copied"] = self.ring[0]["policy"] == POLICY_COPY
        r["segs"], r["ops"] = self.segs[slot].ctypes.data, self.held[slot].ctypes.data
        r["iov"], r["block"] = self.iovs[slot].ctypes.data, 0
        where = self.segs[slot]
        if block:
            at = pop_block(self.wa, self.ra)
            r["block"], r["segs"], r["ops"], r["iov"] = at, at, at + BLOCK_OPS_AT, at + BLOCK_IOV_AT
            where = self.block[: 8 * len(segments)].view(SEGMENT)
        self.held[slot] = np.frombuffer(b"\xee" * 32, GRANT_OP)[0]
        for k, segment in enumerate(segments):
            where[k] = segment
        return True

    def acquire(self, slots: list[int]) -> None:
        """The pages of a pass."""
        self.pass_reqs[: len(slots)] = [self.qa(s) for s in slots]
        grants.acquire(self.wa, self.ra, len(slots))

    def linked(self, slots: list[int]) -> int:
        """The first of some requests, linked by REQ.next as `finish` has them."""
        for slot, following in pairwise(slots):
            self.reqs[slot]["next"] = self.qa(following)
        self.reqs[slots[-1]]["next"] = 0
        return self.qa(slots[0])

    def release(self, *slots: int) -> None:
        grants.release(self.wa, self.linked(list(slots)))

    def copy_back(self, *slots: int) -> None:
        grants.copy_back(self.wa, self.linked(list(slots)))

    def alerts(self) -> int:
        """How often the control thread was called since this was asked last."""
        try:
            return os.eventfd_read(self.alert_fd)
        except BlockingIOError:
            return 0

    def calls(self) -> dict[str, int]:
        """Calls of the seam so far."""
        return {name: int(self.counts[0][f"{name}_calls"]) for name in ("map", "unmap", "copy")}

    def iovecs(self, slot: int) -> list[tuple[int, int]]:
        """(address, length) of a request's memory."""
        r = self.reqs[slot]
        n = int(r["n_iov"])
        rows = self.block[BLOCK_IOV_AT : BLOCK_IOV_AT + 16 * n].view(IOVEC) if r["block"] else self.iovs[slot][:n]
        return [(int(v["base"]), int(v["length"])) for v in rows]

    def cached(self) -> dict[int, int]:
        """gref -> users, of what the ring keeps, the newest first."""
        return {int(e["gref"]): int(e["users"]) for _, e in by_age(self.cache)}

    def check(self) -> None:
        """Nothing was undone that was not done, and no buffer was left."""
        assert self.counts[0]["bad"] == 0
        assert self.counts[0]["largest"] <= self.max_ops
        for memory in self._keep:
            if isinstance(memory, Guarded):
                memory.check()
