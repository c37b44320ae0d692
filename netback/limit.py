"""A rate for a whole vif in one direction, whatever the number of its queues. All of them belong to one worker.

A bucket of bytes: it fills at the rate, up to the burst, and a packet takes its own bytes out of it as long as there is
anything in it. So it may be in debt, by one packet, and over time what passes is the rate exactly; in any t seconds it
is rate * t, and the burst and one packet more at the most.

Queues that wait take turns: each may send what is there when it is its turn, and the next is whose packets have had the
fewest bytes. Who has the turn and does not take it loses it when twice as much is there.
"""

from __future__ import annotations

from typing import Any

from pvdrivers.worker.alarm import wake_at
from pvdrivers.worker.marks import worker_at
from rings.atomics import i64, records
from rings.jit import inline, kernel

from .records import LIMIT, MAX_QUEUES

TURN_NS = 1_000_000
"""What comes in so long is a turn's, but never more than a quarter of the burst."""


@inline
def limit_at(la: int) -> Any:
    """The LIMIT at an address."""
    return records(la, 1, LIMIT)[0]


@inline
def _turn(limit: Any) -> float:
    return min(limit["rate"] * TURN_NS, limit["burst"] / 4)


@inline
def _fill(limit: Any, now: int) -> None:
    limit["tokens"] = min(limit["burst"], limit["tokens"] + (now - limit["at"]) * limit["rate"])
    limit["at"] = now


@inline
def has_credit(la: int) -> bool:
    """Whether one more packet may pass, in a turn or where nobody waits."""
    limit = limit_at(la)
    return limit["rate"] == 0.0 or limit["tokens"] > 0.0


@inline
def charge(la: int, queue: int, nbytes: int) -> None:
    """A packet of a queue passes."""
    limit = limit_at(la)
    if limit["rate"] != 0.0:
        limit["tokens"] -= nbytes
        limit["passed"][queue] += nbytes


@kernel
def is_free(la: int, now: int) -> bool:
    """Whether a packet may pass at once: there is credit, and no queue waits for it."""
    limit = limit_at(la)
    if limit["rate"] == 0.0:
        return True
    _fill(limit, now)
    return limit["tokens"] > 0.0 and limit["waiting"] == 0


@kernel
def may_begin(wa: int, la: int, queue: int, ra: int) -> bool:
    """Whether a queue may send now. If not it waits for its turn, and its ring is served again."""
    limit = limit_at(la)
    if limit["rate"] == 0.0:
        limit["waiting"] = 0
        return True
    now = worker_at(wa)["now"]
    _fill(limit, now)
    mine = i64(1) << queue
    turn = _turn(limit)
    alone = limit["waiting"] & ~mine == 0
    if limit["tokens"] > 0.0 and (alone or limit["turn"] == queue or limit["tokens"] >= 2 * turn):
        return True
    if limit["waiting"] == 0:
        limit["turn"] = queue
    elif limit["waiting"] & mine == 0:
        # What it had no need of before is nothing that it could ask for now.
        limit["passed"][queue] = max(limit["passed"][queue], limit["passed"][limit["turn"]])
    limit["waiting"] |= mine
    wake_at(wa, ra, now + 1 + max(i64((turn - limit["tokens"]) / limit["rate"]), i64(0)))
    return False


@kernel
def end_turn(la: int, queue: int, more: int) -> None:
    """A queue has sent what it may, or had; `more`: it has something left. Who of those that wait has the turn now."""
    limit = limit_at(la)
    if limit["rate"] == 0.0 or (limit["waiting"] == 0 and limit["tokens"] > 0.0):
        return
    mine = i64(1) << queue
    limit["waiting"] = limit["waiting"] | mine if more != 0 else limit["waiting"] & ~mine
    chosen = i64(-1)
    for k in range(1, MAX_QUEUES + 1):
        following = i64((queue + k) % MAX_QUEUES)
        if limit["waiting"] >> following & 1 == 0:
            continue
        if chosen < 0 or limit["passed"][following] < limit["passed"][chosen]:
            chosen = following
    if chosen >= 0:
        limit["turn"] = chosen
