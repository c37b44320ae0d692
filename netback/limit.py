"""A rate for a whole vif in one direction, whatever the number of its queues.

A bucket of bytes: it fills at the rate, up to the burst, and a packet takes its own bytes out of it as long as there is
anything in it. So it may be in debt, by one packet, and over time what passes is the rate exactly; in any t seconds it
is rate * t, and the burst and one packet more at the most.

Queues that wait take turns: each may send what is there when it is its turn, and the next is whose packets have had the
fewest bytes. Who has the turn and does not take it loses it when twice as much is there.

Queues of several workers have one bucket as well. A worker looks into it only while it holds it (LIMIT.holder), which
is for a turn, or for one packet to a guest; who finds it held has no credit now, and comes again AGAIN_NS later. Nobody
waits for it, and where there is no rate, or one worker, nobody holds anything.
"""

from __future__ import annotations

from typing import Any

from pvdrivers.worker.alarm import wake_at
from pvdrivers.worker.marks import worker_at
from rings.atomics import compare_exchange64, i64, records, store_release64
from rings.jit import inline, kernel

from .records import HOLDER_AT, LIMIT, MAX_QUEUES

TURN_NS = 1_000_000
"""What comes in so long is a turn's, but never more than a quarter of the burst."""
AGAIN_NS = 20_000


@inline
def limit_at(la: int) -> Any:
    """The LIMIT at an address."""
    return records(la, 1, LIMIT)[0]


@inline
def _turn(limit: Any) -> float:
    return min(limit["rate"] * TURN_NS, limit["burst"] / 4)


@inline
def _fill(limit: Any, now: int) -> None:
    if now > limit["at"]:  # another worker's pass may have begun later
        limit["tokens"] = min(limit["burst"], limit["tokens"] + (now - limit["at"]) * limit["rate"])
        limit["at"] = now


@inline
def _hold(la: int, queue: int) -> bool:
    """Whether the bucket may be looked into: from now to _let_go()."""
    if limit_at(la)["shared"] == 0:
        return True
    return compare_exchange64(la + HOLDER_AT, 0, 1 + queue) == 0


@inline
def _let_go(la: int, queue: int) -> None:
    if limit_at(la)["holder"] == 1 + queue:  # nobody else writes that
        # Pairs with the exchange: who holds it next sees what is in it now.
        store_release64(la + HOLDER_AT, i64(0))


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
def may_pass(la: int, queue: int, nbytes: int, now: int) -> bool:
    """Whether a packet of a queue may pass at once, as there is credit, and no queue waits for it. Then it does."""
    limit = limit_at(la)
    if limit["rate"] == 0.0:
        return True
    if not _hold(la, queue):
        return False
    _fill(limit, now)
    free = limit["tokens"] > 0.0 and limit["waiting"] == 0
    if free:
        charge(la, queue, nbytes)
    _let_go(la, queue)
    return free


@kernel
def may_begin(wa: int, la: int, queue: int, ra: int) -> bool:
    """Whether a queue may send now, until end_turn(). If not it waits for its turn, and its ring is served again."""
    limit = limit_at(la)
    if limit["rate"] == 0.0:
        if limit["waiting"] != 0:
            limit["waiting"] = 0
        return True
    now = worker_at(wa)["now"]
    if not _hold(la, queue):
        wake_at(wa, ra, now + AGAIN_NS)
        return False
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
    _let_go(la, queue)
    return False


@kernel
def end_turn(la: int, queue: int, more: int) -> None:
    """A queue has sent what it may, or had; `more`: it has something left. Who of those that wait has the turn now."""
    limit = limit_at(la)
    if limit["rate"] != 0.0 and (limit["waiting"] != 0 or limit["tokens"] <= 0.0):
        _choose(la, queue, more)
    _let_go(la, queue)


@kernel
def wait_no_more(wa: int, la: int, queue: int, ra: int) -> None:
    """A queue has nothing left to send, and had no turn: it waits for none. Its ring is served again if that cannot be
    said now."""
    if limit_at(la)["waiting"] >> queue & 1 == 0:
        return
    if not _hold(la, queue):
        wake_at(wa, ra, worker_at(wa)["now"] + AGAIN_NS)
        return
    _choose(la, queue, i64(0))
    _let_go(la, queue)


@kernel
def _choose(la: int, queue: int, more: int) -> None:
    """Who of those that wait has the turn now."""
    limit = limit_at(la)
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
