"""The commit points of a request. Records outlive the process; a ring does not tell enough to be replayed.

Responses overwrite the requests that are still unfinished, and a ring slot is used again while an older request is
pending, so every request is copied to a record of its own. A record goes

    free -> taken      the copy is complete; it counts once the queue's req_cons has passed its index
    taken -> done      status and the index of its response, before the response is put into the ring
    done -> free       the response has been pushed

A new process finds each request in exactly one of: still on the ring (index not passed by req_cons), taken (execute
it again: nobody has been told anything), done and answered (rsp_prod has passed its index: nothing to do), done and
not answered (answer it again, never execute it again: the guest may have been told, and its page and its sectors may
be in use for something else).

The only reader is the process that comes after the death of this one, so program order is all that is needed: the
stores below are releases only to keep the compiler from moving them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers import syscalls
from rings.atomics import compiler_barrier, i64, records, store_release32
from rings.jit import inline, kernel

from .records import RING, WORKER

FREE = 0
TAKEN = 1
DONE = 2

_I4 = np.dtype(np.int32)
PAYLOAD = 112  # bytes of a request, in the native layout of its class; blkif's is 112

JOURNAL_RECORD = np.dtype(
    [
        ("state", "u4"),
        ("req_index", "u4"),
        ("rsp_index", "u4"),
        ("status", "i4"),
        ("taken", "i8"),  # CLOCK_MONOTONIC ns, for `pvdrivers stats --inflight`
        ("pad", "i8"),
        ("payload", "u1", (PAYLOAD,)),
    ],
    align=True,
)
PAYLOAD_AT = 32

JOURNAL_QUEUE = np.dtype(
    [
        ("req_cons", "u4"),
        ("nr_ents", "u4"),
        ("records", "i8"),  # offset in the file
        ("pad", "u1", (48,)),
    ],
    align=True,
)

# Where a test can make the process die (WORKER.kill_step).
STEP_TAKEN = 1  # records are written, req_cons is not
STEP_CONSUMED = 2  # req_cons is written, nothing is submitted
STEP_SUBMITTED = 3  # handed to the store
STEP_COMPLETED = 4  # the store has answered, the journal does not know it
STEP_DONE = 5  # done is written, the response is not in the ring
STEP_PUT = 6  # the response is in the ring, not pushed
STEP_PUSHED = 7  # pushed, the guest not notified
STEP_NOTIFIED = 8  # notified, the records not free
STEP_FREED = 9
STEPS = {
    STEP_TAKEN: "taken",
    STEP_CONSUMED: "consumed",
    STEP_SUBMITTED: "submitted",
    STEP_COMPLETED: "completed",
    STEP_DONE: "done",
    STEP_PUT: "put",
    STEP_PUSHED: "pushed",
    STEP_NOTIFIED: "notified",
    STEP_FREED: "freed",
}

SIGKILL = 9


@kernel
def _die() -> None:
    syscalls.kill(syscalls.getpid(), SIGKILL)


@inline
def checkpoint(w: Any, step: int) -> None:
    """Tests end the process here, as `kill -9` would at the worst of moments. `w` is a WORKER record."""
    if w["kill_step"] == step:
        w["kill_count"] -= 1
        if w["kill_count"] <= 0:
            _die()


@inline
def record_of(ring: Any, index: int) -> int:
    """The address of record `index`. `ring` is a RING record."""
    return ring["records"] + index * ring["record_size"]


@inline
def pop_free(ring: Any) -> int:
    """A free record's index. The caller has seen free_n > 0."""
    ring["free_n"] -= 1
    return i64(records(ring["free"], ring["nr_ents"], _I4)[ring["free_n"]])


@inline
def push_free(ring: Any, index: int) -> None:
    """Give a record back that is in no use."""
    records(ring["free"], ring["nr_ents"], _I4)[ring["free_n"]] = index
    ring["free_n"] += 1


@inline
def commit_taken(record: int, req_index: int, now: int) -> None:
    """The payload is in place: the record says so. It counts once `commit_consumed` has passed req_index."""
    rec = records(record, 1, JOURNAL_RECORD)[0]
    rec["req_index"] = req_index
    rec["taken"] = now
    compiler_barrier()
    store_release32(record, np.uint32(TAKEN))


@inline
def commit_consumed(ring: Any, req_cons: int) -> None:
    """Every record taken up to req_cons counts from here on, and may be executed."""
    store_release32(ring["journal"], np.uint32(req_cons & 0xFFFFFFFF))


@inline
def commit_done(record: int, status: int, rsp_index: int) -> None:
    """The outcome is known. From here on the request is never executed again."""
    rec = records(record, 1, JOURNAL_RECORD)[0]
    rec["status"] = status
    rec["rsp_index"] = rsp_index & 0xFFFFFFFF
    compiler_barrier()
    store_release32(record, np.uint32(DONE))


@inline
def commit_free(record: int) -> None:
    """The response was pushed."""
    store_release32(record, np.uint32(FREE))


__all__ = [
    "DONE",
    "FREE",
    "JOURNAL_QUEUE",
    "JOURNAL_RECORD",
    "PAYLOAD",
    "PAYLOAD_AT",
    "RING",
    "STEPS",
    "TAKEN",
    "WORKER",
    "checkpoint",
    "commit_consumed",
    "commit_done",
    "commit_free",
    "commit_taken",
    "pop_free",
    "push_free",
    "record_of",
]
