"""Answers on their way to a ring. They are in a slot only when it is certain that they will be published.

An answer lies where the request was: half of it says nothing of packets any more, and its first bytes are taken for a
gref. So a process that dies between its first answer and the push of them all may leave no slot changed, or the next
one would send a page that the guest has never named, or write to it. Answers are collected in memory that outlives the
process (see kept_file); ANSWERS.put says that those before it are all there; then they are put into their slots and
pushed. Whoever comes after a process that died behind that puts them once more.

It is enough that the compiler keeps the order: what a killed thread had written, others see.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.worker.journal import STEP_DONE, STEP_PUT, checkpoint
from pvdrivers.worker.marks import ring_at, worker_at
from rings.atomics import compiler_barrier, copy_bytes, distance, i64, load32, load64, records, store32, store64
from rings.jit import inline, kernel
from rings.netif import CTRL_ENTRY_SIZE, CTRL_RESPONSE, TX_ENTRY_SIZE
from rings.ring import RING_END, available, push_quiet, slot

ANSWER_BYTES = 2048
ANSWERS = np.dtype([("put", "i8"), ("bytes", "u1", (ANSWER_BYTES,))], align=True)
"""`bytes`: a ring's answers, by slot. `put`: 1 << 32, and the free-running index up to which they are complete; 0 none
ever were."""
BYTES_AT: int = ANSWERS.fields["bytes"][1]  # type: ignore[index]
_THERE = 1 << 32
_CTRL_SIZE = CTRL_RESPONSE.itemsize


@inline
def answer_at(ra: int, index: int) -> int:
    """Where the answer for the slot of a free-running index is collected, in RING.journal."""
    ring = ring_at(ra)
    shift = 4 if ring["entry_size"] == CTRL_ENTRY_SIZE else 3
    return ring["journal"] + BYTES_AT + ((index & (ring["nr_ents"] - 1)) << shift)


@kernel
def _put(ra: int, first: int, n: int) -> None:
    """Put `n` answers into the slots from index `first` on. What is behind an answer in its slot stays."""
    end, size = ring_at(ra)["end"], ring_at(ra)["entry_size"]
    for k in range(n):
        at = answer_at(ra, first + k)
        if size == TX_ENTRY_SIZE:
            store32(slot(end, first + k), load32(at))
        elif size == CTRL_ENTRY_SIZE:
            copy_bytes(slot(end, first + k), at, _CTRL_SIZE)
        else:
            store64(slot(end, first + k), load64(at))


@kernel
def settle(wa: int, ra: int) -> None:
    """All that is collected, which is something, is certain from here on: put it into the slots. The push is the
    caller's."""
    e: Any = records(ring_at(ra)["end"], 1, RING_END)[0]
    first, n = e["pushed"], distance(e["prod_pvt"], e["pushed"])
    compiler_barrier()
    records(ring_at(ra)["journal"], 1, ANSWERS)[0]["put"] = _THERE | e["prod_pvt"]
    compiler_barrier()
    checkpoint(worker_at(wa), STEP_DONE)
    _put(ra, first, 1)
    checkpoint(worker_at(wa), STEP_PUT)
    _put(ra, first + 1, n - 1)


@kernel
def put_again(ra: int) -> int:
    """Before a worker has the ring: what a process that died had settled and not pushed is put and pushed. How many."""
    put = i64(records(ring_at(ra)["journal"], 1, ANSWERS)[0]["put"])
    e = records(ring_at(ra)["end"], 1, RING_END)[0]
    n = distance(put & 0xFFFFFFFF, e["pushed"])
    # No more than is unanswered: what the ring says may have been changed by the guest.
    if put == 0 or n == 0 or n > i64(available(ring_at(ra)["end"])):
        return i64(0)
    _put(ra, e["pushed"], n)
    e["prod_pvt"] = e["cons"] = (e["pushed"] + n) & 0xFFFFFFFF
    push_quiet(ring_at(ra)["end"])
    return n
