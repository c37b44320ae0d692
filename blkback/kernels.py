"""Small kernels for the control thread, while a ring is not yet a worker's."""

from __future__ import annotations

from pvdrivers.platform import SEAM
from pvdrivers.worker.journal import PAYLOAD_AT
from pvdrivers.worker.marks import ring_at, worker_at
from rings.atomics import call, records
from rings.blkif import INDIRECT_64, OP_INDIRECT, put_response
from rings.jit import kernel
from rings.ring import RING_END, advance_prod, push, slot

from .records import disk_at


@kernel
def answer(ra: int, record: int, status: int) -> None:
    """Put the response to the request in a journal record, as it would have been put the first time."""
    ring = ring_at(ra)
    request = records(record + PAYLOAD_AT, 1, INDIRECT_64)[0]
    operation = request["operation"]
    if operation == OP_INDIRECT:
        operation = request["indirect_op"]
    e = records(ring["end"], 1, RING_END)[0]
    put_response(slot(ring["end"], e["prod_pvt"]), disk_at(ring["device"])["abi"], request["id"], operation, status)
    advance_prod(ring["end"], 1)


@kernel
def push_and_notify(wa: int, ra: int) -> None:
    """Push, and wake the guest whatever it asked for."""
    ring = ring_at(ra)
    push(ring["end"])
    seam = records(worker_at(wa)["seam"], 1, SEAM)[0]
    call(seam["event_notify"], seam["event_ctx"], ring["port"], 0, 0)
