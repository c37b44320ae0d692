"""How many of the guest's pages the rings of a disk may have mapped at once, and what they do with fewer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvdrivers.worker.records import POLICY_COPY, POLICY_MAP, POLICY_PERSISTENT
from rings.blkif import MAX_SEGMENTS

if TYPE_CHECKING:
    from .backend import BlkBackend, Front

log = logging.getLogger(__name__)

PERSISTENT_BOUND = 1056
"""Pages a ring may keep mapped (Linux: max_persistent_grants)."""
IN_FLIGHT = 1056
"""Pages that requests of a ring may have mapped where pages are counted; what is beyond it is copied. 4 MiB of data."""
NO_LIMIT = 1 << 40
_SHARES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """What each ring of a disk may have mapped, its own pages aside."""

    policy: int
    bound: int = 0
    """Pages that it may keep."""
    in_flight: int = 0
    """Pages that were mapped for requests under way."""

    def pages(self, queues: int, order: int) -> int:
        """Of all rings together, with the pages of the rings."""
        return queues * ((1 << order) + self.bound + self.in_flight)


def plans(policy: int, nr_ents: int, segments: int, *, limited: bool) -> Sequence[Plan]:
    """What a ring of so many slots would have, the most first: less and less of it mapped, and copies in the end.

    `segments` is what an indirect request may have, 0 if there are none. Not `limited`: all that it can ever want.
    """
    copies = Plan(POLICY_COPY)
    if policy == POLICY_COPY:
        return [copies]
    bound = PERSISTENT_BOUND if policy == POLICY_PERSISTENT else 0
    if not limited:
        return [Plan(policy, bound, NO_LIMIT)]
    in_flight = min(nr_ents * max(MAX_SEGMENTS, segments), IN_FLIGHT)
    return [*(Plan(policy, bound // share, in_flight // share) for share in _SHARES), copies]


def set_aside(device: BlkBackend, policy: int, said: Front) -> tuple[Plan, int | None]:
    """The plan that fits into the budget, and the pages that it takes of it; None if nobody counts.

    What does not fit is said in the log, with the limit.
    """
    assert device.spec is not None
    budget = device.context.budget
    most = device.spec.grant_pages or None
    limited = budget.limited or most is not None
    steps = plans(policy, said.nr_ents, device.spec.indirect, limited=limited)
    if not limited:
        return steps[0], None
    pages = [plan.pages(len(said.queues), said.order) for plan in steps]
    index, why = budget.reserve(str(device.ident), device.ident.domid, pages, most)
    plan = steps[index]
    if why:
        now = "its requests are copied"
        if plan.policy == POLICY_PERSISTENT:
            now = f"each ring keeps {plan.bound} pages and maps {plan.in_flight} more, the rest is copied"
        elif plan.policy == POLICY_MAP:
            now = f"each ring maps {plan.in_flight} pages at once, the rest is copied"
        text = f"it would have {pages[0]} pages of its guest mapped, but {why}; {now}"
        if text != device.said_of_pages:  # a guest may connect again and again
            device.said_of_pages = text
            log.warning("%s: %s", device.ident, text)
    return plan, pages[index]
