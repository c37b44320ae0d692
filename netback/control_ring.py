"""The worker's entry into the control ring: take a request, fetch the page that it names, answer.

The requests stand in the same worker as the rings of the vif, so what one of them changes is in force for the next
packet. Few are served in a visit: each may be a system call or more, and the neighbours have packets.
"""

from __future__ import annotations

from pvdrivers.worker.batch import op_at, seam_of
from pvdrivers.worker.marks import mark_dead, mark_due, ring_at, stats_at, worker_at
from pvdrivers.worker.records import V_OVERFLOW
from rings.atomics import call, i64, records
from rings.jit import kernel, seam_function
from rings.netif import CTRL_RESPONSE
from rings.ring import CORRUPT, RING_END, advance, available, copy_message, put_part

from .control import conclude, look, request_at
from .control_records import control_at
from .records import port_at

MOST = 4
"""Requests that are served in a visit."""
_RESPONSE_SIZE = CTRL_RESPONSE.itemsize


@kernel
def _fetch(wa: int, ra: int) -> int:
    """What the request names, to private memory: GNTST_*."""
    c = control_at(ring_at(ra)["priv"])
    op = op_at(worker_at(wa)["ops"], 0)
    op["address"], op["flags"] = c["payload"], 0
    op["gref"], op["domid"], op["offset"], op["length"] = c["gref"], ring_at(ra)["domid"], 0, c["fetch"]
    seam = seam_of(wa)
    call(seam["grant_copy"], seam["grant_ctx"], worker_at(wa)["ops"], 1, 0)
    stats_at(ring_at(ra)["stats"])["grants_copied"] += 1
    return i64(op["status"])


@kernel
def _serve(wa: int, ra: int) -> None:
    ca = ring_at(ra)["priv"]
    look(ca)
    if control_at(ca)["fetch"] != 0:
        conclude(ca, _fetch(wa, ra))


@kernel
def _respond(ra: int) -> None:
    ca = ring_at(ra)["priv"]
    c = control_at(ca)
    request = request_at(ca)
    response = records(c["response"], 1, CTRL_RESPONSE)[0]
    response["id"], response["type"] = request["id"], request["type"]
    response["status"], response["data"] = c["status"], c["data"]
    put_part(ring_at(ra)["end"], c["response"], _RESPONSE_SIZE)


@seam_function
def step_control(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step of a control ring. 1 if more may be pending."""
    ring = ring_at(ra)
    if abandoned != 0:
        return 0
    ring["blocked"] = port_at(ring["device"])["handed_over"]  # then what is on the ring is for the next process
    if ring["blocked"] != 0:
        return 0
    n = available(ring["end"])
    if n == CORRUPT:
        mark_dead(ra, V_OVERFLOW)
        return 0
    for _ in range(min(n, MOST)):
        copy_message(ring["end"], records(ring["end"], 1, RING_END)[0]["cons"], control_at(ring["priv"])["request"])
        advance(ring["end"], 1)
        _serve(wa, ra)
        _respond(ra)
    if n > 0:
        mark_due(wa, ra)
    return 1 if n > MOST else 0
