"""How many grefs of a vif may be kept mapped, of what the host allows; and letting go of them all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from pvdrivers.platform import GRANT_OP
from pvdrivers.worker.batch import op_at, unmap_batch
from pvdrivers.worker.control import Memory
from rings.jit import compile_for, kernel

from .control_records import MOST_STAGED
from .staging import STAGE_SIZE, format_stage, stage_at, take_one

if TYPE_CHECKING:
    from .backend import VifBackend

log = logging.getLogger(__name__)

_SHARES = (1, 2, 4, 8)


def offer(device: VifBackend, queues: int, most: int) -> int:
    """Grefs of each queue that may be kept mapped, at most `most`: set aside in the budget. 0: none.

    What does not fit is said in the log, with the limit.
    """
    if most == 0:
        return 0
    steps = [*(most // share for share in _SHARES), 0]
    budget = device.context.budget
    if not budget.limited:
        return most
    index, why = budget.reserve(str(device.ident), device.ident.domid, [step * queues for step in steps])
    if why:
        log.warning(
            "%s: it would keep %d pages of its guest mapped, but %s; it is offered %d a queue, the rest is copied",
            device.ident, most * queues, why, steps[index],
        )  # fmt: skip
    return steps[index]


class Staging:
    """The tables of a vif, STAGE[queues] at `address`."""

    def __init__(self, device: VifBackend, queues: int, limit: int) -> None:
        """`limit` is what offer() says. The vif's counters are there."""
        assert device.counters is not None and 0 <= limit <= MOST_STAGED
        self._device, self._queues = device, queues
        self._memory = Memory(queues * STAGE_SIZE)
        self.address = self._memory.address
        for q in range(queues):
            format_stage(self.at(q), limit)
            set_owner(self.at(q), device.queues[q].worker.address, device.counters.address(q))

    def at(self, queue: int) -> int:
        """The address of the STAGE of a queue."""
        return self.address + queue * STAGE_SIZE

    def release(self) -> None:
        """Unmap all, and give back what was set aside. No worker serves any of the vif's rings any more."""
        ops = np.zeros(MOST_STAGED, GRANT_OP)
        for q in range(self._queues):
            unmap_all(self.at(q), ops.ctypes.data)
        self._device.context.budget.give_back(str(self._device.ident))


@kernel
def set_owner(sa: int, wa: int, stats: int) -> None:
    """Say whose its queue is, and where the STATS of that are."""
    stage_at(sa)["worker"], stage_at(sa)["stats"] = wa, stats


@kernel
def unmap_all(sa: int, ops: int) -> None:
    """Empty a table. `ops` is the address of GRANT_OP[MOST_STAGED], of the control thread's own.

    By the seam of its queue's worker, which has mapped them: on Xen a handle says nothing to another's.
    """
    n = 0
    while stage_at(sa)["used"] > 0:
        op_at(ops, n)["handle"] = take_one(sa)
        n += 1
    unmap_batch(stage_at(sa)["worker"], ops, n)


def warm() -> None:
    """Compile what the control thread calls."""
    compile_for(format_stage, 2)
    compile_for(set_owner, 3)
    compile_for(unmap_all, 2)
