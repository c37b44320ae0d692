"""The worker's entry into the control ring: take a request, fetch the page that it names, answer.

Its worker is that of the vif's first queue. What a request sets is in force for the next packet, or a few later on
queues of other workers. What it wants of the staged pages of a queue of another worker's is done by that one: these
tables are looked at without a lock. Then no other request is looked at meanwhile, so answers keep their order.

Few are served in a visit, and of those that name a page, which are system calls, one: the neighbours have packets.
"""

from __future__ import annotations

from pvdrivers.platform import OP_READONLY, OP_TO_GUEST
from pvdrivers.syscalls import eventfd_add
from pvdrivers.worker.batch import map_batch, op_at, seam_of, unmap_batch
from pvdrivers.worker.marks import mark_due, ring_at, stats_at, worker_at
from rings.atomics import call, copy_bytes, i64, load_acquire64, records, store_release64
from rings.jit import inline, kernel, seam_function
from rings.netif import CTRL_GET_GREF_MAPPING_SIZE, CTRL_RESPONSE, CTRL_SUCCESS, GREF, GREF_readonly
from rings.ring import RING_END, advance, advance_prod, copy_message

from .answers import answer_at
from .control import conclude, look, mapped, request_at, stored
from .control_records import DO_FETCH, DO_MAP, DO_STORE, control_at
from .serving import to_serve
from .staging import JOB_AT, stage_at

MOST = 4
"""Requests that are served in a visit, up to the first that names a page."""
_GREF_SIZE = GREF.itemsize
_RESPONSE_SIZE = CTRL_RESPONSE.itemsize


@kernel
def _copy(wa: int, ca: int, domid: int, flags: int) -> int:
    """Between the page that the request names and the payload: GNTST_*."""
    c = control_at(ca)
    op = op_at(worker_at(wa)["ops"], 0)
    op["address"], op["flags"] = c["payload"], flags
    op["gref"], op["domid"], op["offset"], op["length"] = c["gref"], domid, 0, c["nbytes"]
    seam = seam_of(wa)
    call(seam["grant_copy"], seam["grant_ctx"], worker_at(wa)["ops"], 1, 0)
    return i64(op["status"])


@kernel
def _map(wa: int, ca: int, domid: int) -> None:
    """What the payload lists, in one call; and if one of it cannot be had, none."""
    c = control_at(ca)
    ops, n = worker_at(wa)["ops"], i64(c["count"])
    for k in range(n):
        wanted = records(c["payload"] + k * _GREF_SIZE, 1, GREF)[0]
        op = op_at(ops, k)
        op["gref"], op["domid"] = wanted["ref"], domid
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
def _conclude(wa: int, ca: int, domid: int) -> None:
    """What the request names is here, or could not be had: to its answer. Of a STAGE that is this worker's."""
    c = control_at(ca)
    conclude(ca, c["fetched"])
    if c["next"] == DO_MAP:
        _map(wa, ca, domid)
    elif c["next"] == DO_STORE:
        status = _copy(wa, ca, domid, OP_TO_GUEST)
        stats_at(stage_at(c["stage"])["stats"])["grants_copied"] += 1
        unmap_batch(wa, worker_at(wa)["ops"], stored(ca, status, worker_at(wa)["ops"]))
    else:
        return
    stats_at(stage_at(c["stage"])["stats"])["persistent_held"] = stage_at(c["stage"])["used"]


@kernel
def _serve(wa: int, ra: int) -> int:
    """One request, to its answer; or to the worker whose STAGE it is about, see CONTROL.away. 1 if it names a page."""
    ca, domid = ring_at(ra)["priv"], ring_at(ra)["domid"]
    c = control_at(ca)
    look(ca)
    if c["next"] != DO_FETCH:
        return i64(0)
    c["fetched"] = _copy(wa, ca, domid, 0)
    stats_at(ring_at(ra)["stats"])["grants_copied"] += 1
    if request_at(ca)["type"] >= CTRL_GET_GREF_MAPPING_SIZE and stage_at(c["stage"])["worker"] != wa:
        c["away"] = 1
        # Release, pairs with the acquire in do_job: who sees that there is a request sees all of it.
        store_release64(c["stage"] + JOB_AT, ca)
        eventfd_add(worker_at(stage_at(c["stage"])["worker"])["doorbell_fd"], 1)
        return i64(1)
    _conclude(wa, ca, domid)
    return i64(1)


@kernel
def do_job(wa: int, sa: int, domid: int) -> None:
    """A request about a STAGE of this worker's that has come by a control ring of another's, if there is one."""
    ca = load_acquire64(sa + JOB_AT)
    if ca == 0:
        return
    _conclude(wa, ca, domid)
    doorbell = worker_at(control_at(ca)["worker"])["doorbell_fd"]
    # Release, pairs with the acquire in _is_back: who sees that it is done sees the answer.
    store_release64(sa + JOB_AT, i64(0))
    eventfd_add(doorbell, 1)


@inline
def _is_back(ca: int) -> bool:
    return load_acquire64(control_at(ca)["stage"] + JOB_AT) == 0


@kernel
def _respond(ra: int) -> None:
    ca = ring_at(ra)["priv"]
    c = control_at(ca)
    request = request_at(ca)
    response = records(c["response"], 1, CTRL_RESPONSE)[0]
    response["id"], response["type"] = request["id"], request["type"]
    response["status"], response["data"] = c["status"], c["data"]
    end = ring_at(ra)["end"]
    copy_bytes(answer_at(ra, records(end, 1, RING_END)[0]["prod_pvt"]), c["response"], _RESPONSE_SIZE)
    advance_prod(end, 1)


@seam_function
def step_control(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step of a control ring. 1 if more may be pending."""
    ring = ring_at(ra)
    if abandoned != 0:
        return 0
    ca = ring["priv"]
    if control_at(ca)["away"] != 0:
        if not _is_back(ca):
            ring["blocked"] = 1  # until the doorbell rings
            return 0
        control_at(ca)["away"] = 0
        _respond(ra)
        mark_due(wa, ra)
    n = i64(to_serve(ra))
    served = i64(0)
    costly = i64(0)
    while served < min(n, MOST) and costly == 0:
        copy_message(ring["end"], records(ring["end"], 1, RING_END)[0]["cons"], control_at(ca)["request"])
        advance(ring["end"], 1)
        costly = i64(_serve(wa, ra))
        served += 1
        if control_at(ca)["away"] != 0:
            ring["blocked"] = 1
            mark_due(wa, ra)
            return 0
        _respond(ra)
    if n > 0:
        mark_due(wa, ra)
    return 1 if n > served else 0
