"""The worker's entry into the control ring: take a request, fetch the page that it names, answer.

The requests stand in the same worker as the rings of the vif, so what one of them changes is in force for the next
packet. Few are served in a visit: each may be a system call or more, and the neighbours have packets.
"""

from __future__ import annotations

from pvdrivers.platform import OP_READONLY, OP_TO_GUEST
from pvdrivers.worker.batch import map_batch, op_at, seam_of, unmap_batch
from pvdrivers.worker.marks import mark_due, ring_at, stats_at, worker_at
from rings.atomics import call, i64, records
from rings.jit import kernel, seam_function
from rings.netif import CTRL_RESPONSE, CTRL_SUCCESS, GREF, GREF_readonly
from rings.ring import RING_END, advance, copy_message, put_part

from .control import conclude, look, mapped, request_at, stored
from .control_records import DO_FETCH, DO_MAP, DO_STORE, control_at
from .queue import to_serve
from .staging import stage_at

MOST = 4
"""Requests that are served in a visit."""
_GREF_SIZE = GREF.itemsize
_RESPONSE_SIZE = CTRL_RESPONSE.itemsize


@kernel
def _copy(wa: int, ra: int, flags: int) -> int:
    """Between the page that the request names and the payload: GNTST_*."""
    c = control_at(ring_at(ra)["priv"])
    op = op_at(worker_at(wa)["ops"], 0)
    op["address"], op["flags"] = c["payload"], flags
    op["gref"], op["domid"], op["offset"], op["length"] = c["gref"], ring_at(ra)["domid"], 0, c["nbytes"]
    seam = seam_of(wa)
    call(seam["grant_copy"], seam["grant_ctx"], worker_at(wa)["ops"], 1, 0)
    stats_at(ring_at(ra)["stats"])["grants_copied"] += 1
    return i64(op["status"])


@kernel
def _map(wa: int, ra: int) -> None:
    """What the payload lists, in one call; and if one of it cannot be had, none."""
    ca = ring_at(ra)["priv"]
    c = control_at(ca)
    ops, n = worker_at(wa)["ops"], i64(c["count"])
    for k in range(n):
        wanted = records(c["payload"] + k * _GREF_SIZE, 1, GREF)[0]
        op = op_at(ops, k)
        op["gref"], op["domid"] = wanted["ref"], ring_at(ra)["domid"]
        op["flags"] = OP_READONLY if wanted["flags"] & GREF_readonly != 0 else 0
    map_batch(wa, n)
    unmaps = mapped(ca, ops)
    stats = stats_at(stage_at(c["stage"])["stats"])
    if c["status"] == CTRL_SUCCESS:
        stats["grants_mapped"] += n
    else:
        stats["map_failures"] += n - unmaps
    unmap_batch(wa, ops, unmaps)


@kernel
def _serve(wa: int, ra: int) -> None:
    """One request, to its answer."""
    ca = ring_at(ra)["priv"]
    c = control_at(ca)
    look(ca)
    if c["next"] == DO_FETCH:
        conclude(ca, _copy(wa, ra, 0))
    if c["next"] == DO_MAP:
        _map(wa, ra)
    elif c["next"] == DO_STORE:
        status = _copy(wa, ra, OP_TO_GUEST)
        unmap_batch(wa, worker_at(wa)["ops"], stored(ca, status, worker_at(wa)["ops"]))
    else:
        return
    stats_at(stage_at(c["stage"])["stats"])["persistent_held"] = stage_at(c["stage"])["used"]


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
    n = i64(to_serve(ra))
    for _ in range(min(n, MOST)):
        copy_message(ring["end"], records(ring["end"], 1, RING_END)[0]["cons"], control_at(ring["priv"])["request"])
        advance(ring["end"], 1)
        _serve(wa, ra)
        _respond(ra)
    if n > 0:
        mark_due(wa, ra)
    return 1 if n > MOST else 0
