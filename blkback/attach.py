"""Filling in the records of a disk and its rings: fresh, or as a dead predecessor left them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pvdrivers.device import NotRecoverable
from pvdrivers.errors import ProtocolViolation
from pvdrivers.platform import GRANT_OP
from pvdrivers.storage.store import STORE_FILE, Store
from pvdrivers.storage.uri import DiskSpec
from pvdrivers.worker.cache import drop_cache
from pvdrivers.worker.control import Memory
from pvdrivers.worker.journal import FREE, JOURNAL_RECORD
from pvdrivers.worker.persistent import ENTRY, PERSISTENT_CACHE, format_cache
from pvdrivers.worker.records import POLICY_PERSISTENT, REQ
from rings import blkif
from rings import ring as ringlib
from rings.jit import address_of, compile_for

from . import queue
from .kernels import answer, push_and_notify
from .pages import PERSISTENT_BOUND
from .records import BLK_REQ

if TYPE_CHECKING:
    from .backend import BlkBackend, Front, QueueState

PERSISTENT_HEADS = 2048
KEEP_NS = 60_000_000_000
"""How long an unused page is kept (Linux: persistent_grant_unused_seconds)."""
FOREVER = 0x7FFFFFFFFFFFFFFF


def format_disk(disk: np.ndarray, spec: DiskSpec, store: Store, abi: int, discard_enabled: bool) -> None:
    """The DISK record of an open store."""
    disk[0] = np.zeros((), disk.dtype)
    row = disk[0]
    row["sectors"] = store.sectors
    row["sector_mask"] = store.sector_size // 512 - 1
    row["unit_shift"] = (store.sector_size // 512).bit_length() - 1 if spec.compat_4k else 0
    row["max_segments"] = spec.indirect
    row["readonly"] = store.readonly
    row["can_flush"] = store.can_flush
    row["can_barrier"] = store.can_flush
    row["can_discard"] = store.can_discard and discard_enabled
    row["can_secure"] = row["can_discard"] and store.can_secure_discard
    row["store"] = store.kind
    row["fd"] = store.fd if store.kind == STORE_FILE else -1
    row["memory"] = store.address
    row["skip_flush"] = not store.flush_is_needed
    row["chunk"] = store.submit_chunk
    row["abi"] = abi


def attach_queue(device: BlkBackend, state: QueueState, q: int, said: Front, recover: bool) -> None:
    """Fill in the RING of queue q. The worker is not told yet.

    Raises ProtocolViolation for indices that no ring can have, NotRecoverable for a journal that does not fit them.
    """
    assert device.journal is not None and device.counters is not None
    worker, n = state.worker, said.nr_ents
    state.handle = handle = worker.new_ring(device, state.port)
    row = handle.record
    end = np.zeros(1, ringlib.RING_END)
    reqs = Memory(n * BLK_REQ.itemsize)
    free = np.zeros(n, np.int32)
    state.keep = [end, reqs, free]
    size = blkif.ENTRY_SIZE[said.abi]
    if ringlib.back_end(end.ctypes.data, state.mapping.address, n, size) == ringlib.CORRUPT:
        raise ProtocolViolation(device.ident.domid, str(device.ident), f"queue {q}: indices that no ring can have")
    row["step"], row["finish"] = address_of(queue.step), address_of(queue.finish)
    row["end"], row["device"] = end.ctypes.data, device.disk.ctypes.data
    row["nr_ents"], row["entry_size"] = n, size
    row["journal"], row["records"] = device.journal.queue_address(q), device.journal.records_address(q)
    row["record_size"] = JOURNAL_RECORD.itemsize
    row["reqs"], row["req_size"] = reqs.address, BLK_REQ.itemsize
    row["domid"], row["policy"], row["pages_limit"] = device.ident.domid, device.plan.policy, device.plan.in_flight
    row["free"], row["stats"] = free.ctypes.data, device.counters.address(q)
    row["keep_ns"] = KEEP_NS
    device.counters.queues[q]["nr_ents"] = n
    if device.plan.policy == POLICY_PERSISTENT:
        _format_cache(state, device.plan.bound)
    busy: list[int] = []
    if recover:
        busy = _recover(device, state, q)
    else:
        device.journal.reset(q, int(end[0]["cons"]))
    left = [i for i in range(n - 1, -1, -1) if i not in set(busy)]
    free[: len(left)] = left
    row["free_n"] = len(left)


def _format_cache(state: QueueState, bound: int) -> None:
    cache = np.zeros(1, PERSISTENT_CACHE)
    memory = Memory(PERSISTENT_HEADS * 4 + bound * ENTRY.itemsize)
    cache[0]["heads"], cache[0]["n_heads"] = memory.address, PERSISTENT_HEADS
    cache[0]["entries"], cache[0]["bound"] = memory.address + PERSISTENT_HEADS * 4, bound
    format_cache(cache.ctypes.data)
    state.keep += [cache, memory]
    assert state.handle is not None
    state.handle.record["cache"] = cache.ctypes.data


def _recover(device: BlkBackend, state: QueueState, q: int) -> list[int]:
    """Answer what was done and never answered, line up what was taken; the records that stay in use."""
    assert device.journal is not None and state.handle is not None
    row = state.handle.record
    end = state.keep[0]
    # rsp_prod as it was found in the guest's page: ours, if the guest is honest. If not, the sums do not fit. It was
    # read once, by back_end: the guest may have changed it since.
    plan = device.journal.recover(q, int(end[0]["prod_pvt"]))
    if plan is None:
        raise NotRecoverable(f"{device.ident}: queue {q}: the ring's indices do not fit its journal")
    end[0]["cons"] = plan.req_cons
    if (plan.req_cons - int(end[0]["prod_pvt"])) & 0x80000000:
        raise NotRecoverable(f"{device.ident}: queue {q}: more answers than requests")
    rows = device.journal.records(q)
    for i in plan.answer:
        address = device.journal.records_address(q) + i * JOURNAL_RECORD.itemsize
        answer(state.handle.address, address, int(rows[i]["status"]))
    # Whether the dead process got as far as the notification nobody knows: once too often is right.
    push_and_notify(state.worker.address, state.handle.address)
    for i in plan.answer:
        rows[i]["state"] = FREE
    reqs = state.keep[1].array(BLK_REQ, len(rows))
    heads = reqs["head"].view(REQ)
    following = 0
    for i in reversed(plan.execute):
        heads[i]["ring"], heads[i]["index"], heads[i]["next"] = state.handle.address, i, following
        following = int(row["reqs"]) + i * BLK_REQ.itemsize
    row["replay_head"] = following
    row["inflight"] = len(plan.execute)
    return plan.execute


def detach_queue(state: QueueState) -> None:
    """Have the worker stop with this ring, its I/O finished."""
    assert state.handle is not None
    state.last = np.array([state.handle.record])  # its place is another disk's as soon as it is detached
    state.worker.detach(state.handle)


def drop_grants(state: QueueState) -> None:
    """Unmap what the ring kept mapped. The worker no longer serves it."""
    if state.last is not None and int(state.last[0]["cache"]):
        ops = np.zeros(PERSISTENT_BOUND, GRANT_OP)
        drop_cache(state.worker.address, state.last.ctypes.data, FOREVER, ops.ctypes.data, len(ops))


def warm() -> None:
    """Compile what attaching and detaching call."""
    compile_for(answer, 3)
    compile_for(push_and_notify, 2)
    compile_for(format_cache, 1)
    compile_for(drop_cache, 5)
    compile_for(ringlib.back_end, 4)
