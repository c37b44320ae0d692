"""What rings have of a worker's pools while their stores never answer, and what is left for the next one."""

from __future__ import annotations

import numpy as np
import pytest

from pvdrivers.worker import control, pools
from pvdrivers.worker.records import BLOCK_SIZE, RING, WORKER
from rings.jit import kernel

RINGS = 400
USUAL = 256  # segments of a large request


@kernel
def hang(wa: int, ra: int, requests: int, pages: int) -> int:
    """Take large requests, copied, and never give anything back; how many were taken."""
    for n in range(requests):
        if not pools.may_have_block(wa, ra) or not pools.reserve_bounce(wa, ra, pages):
            return n
        pools.pop_block(wa, ra)
        for _ in range(pages):
            pools.pop_bounce(wa)
        pools.worker_at(wa)["bounce_reserved"] = 0
        pools.ring_at(ra)["bounced"] += pages
    return requests


class Pools:
    """A WORKER with pools of the service's size, and nothing behind their addresses: nobody looks there."""

    def __init__(self) -> None:
        self.worker, self.rings = np.zeros(1, WORKER), np.zeros(RINGS, RING)
        self.blocks = np.arange(control.BLOCKS, dtype=np.int64) * BLOCK_SIZE
        self.bounce = np.arange(control.BOUNCE_PAGES, dtype=np.int32)
        w = self.worker[0]
        w["blocks_free"], w["blocks_n"] = self.blocks.ctypes.data, control.BLOCKS
        w["bounce_free"], w["bounce_n"] = self.bounce.ctypes.data, control.BOUNCE_PAGES
        w["blocks_kept"], w["bounce_kept"] = control.BLOCKS_KEPT, control.BOUNCE_KEPT

    def hang(self, ring: int, requests: int, pages: int) -> int:
        return int(hang(self.worker.ctypes.data, self.rings[ring : ring + 1].ctypes.data, requests, pages))


def naive(rings: list[tuple[int, int]], blocks: int, bounce: int) -> list[int]:
    """How many of its requests each ring gets, one after the other: (requests, pages of each)."""
    out = []
    for requests, pages in rings:
        n = 0
        while n < requests:
            if blocks < 1 or bounce < pages:
                break
            share = min(pools.RING_BLOCKS, (blocks - control.BLOCKS_KEPT) // 8)
            page_share = min(pools.RING_BOUNCE, (bounce - control.BOUNCE_KEPT) // 8)
            if n > 0 and (n + 1 > share or (n + 1) * pages > page_share):
                break
            n, blocks, bounce = n + 1, blocks - 1, bounce - pages
        out.append(n)
    return out


@pytest.mark.parametrize("dead", [1, 2, 10, 40, 250])
def test_dead_stores_leave_enough(dead: int) -> None:
    """However many requests they have taken, the next guest's large ones go on."""
    pool = Pools()
    taken = [pool.hang(ring, 512, USUAL) for ring in range(dead)]
    assert taken[0] == pools.RING_BOUNCE // USUAL
    assert all(taken)
    assert taken == naive([(512, USUAL)] * dead, control.BLOCKS, control.BOUNCE_PAGES)
    assert pool.hang(dead, 512, USUAL) >= (4 if dead <= 40 else 1)


def test_without_data_to_copy_it_is_blocks_alone() -> None:
    pool = Pools()
    taken = [pool.hang(ring, 512, 0) for ring in range(RINGS - 1)]
    assert taken == naive([(512, 0)] * (RINGS - 1), control.BLOCKS, control.BOUNCE_PAGES)
    assert taken[0] == pools.RING_BLOCKS and taken[14] >= 32 and all(taken)
    assert pool.hang(RINGS - 1, 512, 0) >= 1


def test_fifty_dead_stores_of_guests_with_small_rings() -> None:
    """32 slots, as Linux has by default: another such guest's ring is full of large requests all the same."""
    pool = Pools()
    assert [pool.hang(ring, 32, 0) for ring in range(50)] == [32] * 50
    assert pool.hang(50, 32, 0) == 32


def test_the_largest_request_is_carried() -> None:
    pool = Pools()
    assert pool.hang(0, 2, 4096) == 1  # alone
    assert pool.worker[0]["starved"] == 0 and pool.rings[0]["throttled"] == 1


def test_who_has_nothing_waits_for_the_others() -> None:
    pool = Pools()
    pool.worker[0]["blocks_n"] = 0
    assert pool.hang(0, 1, 1) == 0
    assert pool.worker[0]["starved"] == 1 and pool.rings[0]["throttled"] == 0
