"""Several rings of one worker, visited as the loop does it: none waits for ever, and each can be taken away.

Nothing runs by itself here. The store is memory, the seam counts, and a pass is made when a test asks for one.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blkback import attach, queue, take
from blkback.records import BLK_REQ, DISK
from pvdrivers.journal import Journal
from pvdrivers.platform import SEAM
from pvdrivers.storage.constants import STORE_MEMORY, STORE_NULL
from pvdrivers.storage.uring_layout import URING
from pvdrivers.worker import grants, loop
from pvdrivers.worker.control import Memory
from pvdrivers.worker.journal import JOURNAL_RECORD, TAKEN
from pvdrivers.worker.marks import complete, mark_ready, worker_at
from pvdrivers.worker.records import (
    POLICY_COPY,
    POLICY_MAP,
    POLICY_PERSISTENT,
    REQ,
    RING,
    RING_ACTIVE,
    RING_DETACHED,
    RING_DETACHING,
    STATS,
)
from rings import blkif
from rings import ring as ringlib
from rings.jit import address_of, kernel, seam_function
from tests.worker.bed import DOMID, PAGE, Bed, new_cache

NR, SLOTS, RINGS = 32, 8, 2
pytestmark = pytest.mark.jit_only("the addresses of compiled functions are what a ring is served by")


@seam_function
def nobody_listens(ctx: int, port: int, b: int, c: int) -> int:
    """SEAM.event_notify."""
    return 0


@kernel
def passes(wa: int, n: int) -> None:
    """What `loop.run` does between two looks at io_uring."""
    for _ in range(n):
        loop._finish(wa)
        loop._poll_active(wa)
        loop._serve(wa)
        loop._finish(wa)
        w = worker_at(wa)
        if w["leaving"] != 0:
            w["leaving"] = 0
            loop._arm(wa, 0)
            loop._look_at_rings(wa)


@kernel
def look(wa: int) -> None:
    """The doorbell rang."""
    loop._look_at_rings(wa)


class Queues:
    """One disk, two rings, one worker; with `recover` the successor of one whose guest and journal these are."""

    def __init__(
        self, path: Path, policy: int = POLICY_MAP, before: Queues | None = None, *, bounce: int = 16, blocks: int = 1
    ) -> None:
        self.bed = bed = Bed(policy, grefs=SLOTS, slots=SLOTS, max_ops=16, bounce=bounce, blocks=blocks)
        seam: Any = next(k for k in bed._keep if isinstance(k, np.ndarray) and k.dtype == SEAM)
        seam["event_notify"] = address_of(nobody_listens)
        self.memory = before.memory if before else Memory((RINGS + SLOTS) * PAGE)
        self.store = self.memory.bytes[RINGS * PAGE :]
        self.uring, self.disk = np.zeros(1, URING), np.zeros(1, DISK)
        self.rings, self.stats = np.zeros(RINGS, RING), np.zeros(RINGS, STATS)
        self.ends, self.free = np.zeros(RINGS, ringlib.RING_END), np.zeros((RINGS, NR), np.int32)
        self.reqs = [Memory(NR * BLK_REQ.itemsize) for _ in range(RINGS)]
        self.answered = [0] * RINGS
        w: Any = bed.worker[0]
        w["rings"], w["max_rings"], w["top_ring"] = self.rings.ctypes.data, RINGS, RINGS
        w["uring"], w["heavy_limit"] = self.uring.ctypes.data, 1 << 30
        disk: Any = self.disk[0]
        disk["sectors"], disk["store"], disk["abi"] = SLOTS * 8, STORE_MEMORY, blkif.ABI_64
        disk["memory"], disk["n_rings"], disk["max_segments"] = self.store.ctypes.data, RINGS, 32
        disk["can_flush"] = disk["can_barrier"] = 1
        sizes = [NR] * RINGS
        journal = Journal.open(path, "who", sizes) if before else Journal.create(path, "who", sizes)
        assert journal is not None
        self.journal = journal
        for q in range(RINGS):
            self._fill(q, policy, recover=before is not None)
        for q in range(RINGS):
            mark_ready(bed.wa, self.ra(q))

    def _fill(self, q: int, policy: int, *, recover: bool) -> None:
        ring: Any = self.rings[q]
        page = self.memory.address + q * PAGE
        if not recover:
            self.indices(q)[:] = [0, 1, 0, 1]
        ringlib.back_end(self.end(q), page, NR, blkif.ENTRY_SIZE_64)
        ring["state"], ring["worker"], ring["domid"], ring["index"] = RING_ACTIVE, self.bed.wa, DOMID, q
        ring["policy"], ring["stats"] = policy, self.stats[q : q + 1].ctypes.data
        ring["step"], ring["finish"] = address_of(queue.step), address_of(queue.finish)
        ring["end"], ring["device"], ring["event_fd"] = self.end(q), self.disk.ctypes.data, -1
        ring["nr_ents"], ring["entry_size"] = NR, blkif.ENTRY_SIZE_64
        ring["journal"], ring["records"] = self.journal.queue_address(q), self.journal.records_address(q)
        ring["record_size"] = JOURNAL_RECORD.itemsize
        ring["reqs"], ring["req_size"] = self.reqs[q].address, BLK_REQ.itemsize
        ring["free"], ring["pages_limit"] = self.free[q].ctypes.data, 1 << 40
        if policy == POLICY_PERSISTENT:
            cache, memory = new_cache(6, 4)
            ring["cache"], ring["keep_ns"] = cache.ctypes.data, 60_000_000_000
            self.bed._keep += [cache, *memory]
        self.disk[0]["rings"][q] = self.ra(q)
        busy: list[int] = []
        if recover:
            handle = SimpleNamespace(record=ring, address=self.ra(q))
            keep = [self.ends[q : q + 1], self.reqs[q]]
            state = SimpleNamespace(handle=handle, keep=keep, worker=SimpleNamespace(address=self.bed.wa))
            device: Any = SimpleNamespace(journal=self.journal, ident="vbd-7-51712")
            busy = attach._recover(device, state, q)  # type: ignore[arg-type]
        left = [i for i in range(NR) if i not in busy]
        self.free[q, : len(left)] = left
        ring["free_n"] = len(left)

    def ra(self, q: int) -> int:
        return int(self.rings[q : q + 1].ctypes.data)

    def end(self, q: int) -> int:
        return int(self.ends[q : q + 1].ctypes.data)

    def indices(self, q: int) -> np.ndarray:
        """req_prod, req_event, rsp_prod, rsp_event."""
        return self.memory.bytes[q * PAGE : q * PAGE + 16].view(np.uint32)

    def put(self, q: int, operation: int, grefs: list[int], count: int = 1) -> None:
        """`count` times the same request, for block 0 on."""
        for _ in range(count):
            index = int(self.indices(q)[0])
            at = q * PAGE + 64 + index % NR * blkif.ENTRY_SIZE_64
            row = self.memory.bytes[at : at + blkif.ENTRY_SIZE_64].view(blkif.REQUEST_64)[0]
            row["operation"], row["nr_segments"], row["id"], row["sector_number"] = operation, len(grefs), index, 0
            for k, gref in enumerate(grefs):
                row["seg"][k]["gref"], row["seg"][k]["first_sect"], row["seg"][k]["last_sect"] = gref, 0, 7
            self.indices(q)[0] = index + 1

    def put_indirect(self, q: int, count: int, gref: int = 9999) -> None:
        """Indirect reads of 16 segments. Their page is granted to nobody: they take a block until they have failed."""
        for _ in range(count):
            index = int(self.indices(q)[0])
            at = q * PAGE + 64 + index % NR * blkif.ENTRY_SIZE_64
            row = self.memory.bytes[at : at + blkif.INDIRECT_64.itemsize].view(blkif.INDIRECT_64)[0]
            row["operation"], row["indirect_op"], row["nr_segments"] = blkif.OP_INDIRECT, blkif.OP_READ, 16
            row["id"], row["indirect_grefs"] = index, gref
            self.indices(q)[0] = index + 1

    def answers(self, q: int) -> list[int]:
        """The statuses of what was answered since."""
        out = []
        while self.answered[q] != int(self.indices(q)[2]):
            at = q * PAGE + 64 + self.answered[q] % NR * blkif.ENTRY_SIZE_64
            out.append(int(self.memory.bytes[at : at + blkif.RESPONSE_SIZE_64].view(blkif.RESPONSE_64)[0]["status"]))
            self.answered[q] += 1
        return out

    def run(self, n: int) -> None:
        passes(self.bed.wa, n)

    def detach(self, q: int) -> None:
        """As Worker.detach does it."""
        self.rings[q]["state"] = RING_DETACHING
        look(self.bed.wa)

    def taken(self, q: int) -> int:
        return int((self.journal.records(q)["state"] == TAKEN).sum())


def test_a_block_goes_to_who_has_waited(tmp_path: Path) -> None:
    """One ring asks for more blocks than there are, always; the other for one."""
    queues = Queues(tmp_path / "journal")
    queues.put_indirect(1, 1)
    for _ in range(20):
        queues.put_indirect(0, NR - (int(queues.indices(0)[0]) - int(queues.indices(0)[2])))
        queues.run(1)
    assert len(queues.answers(1)) == 1
    queues.bed.check()


@seam_function
def never_answered(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step of a disk whose store takes requests and is not heard of again."""
    n = take.take(wa, ra, budget)
    if n == 0:
        return 0
    take.fetch_indirect(wa, ra, n)
    grants.acquire(wa, ra, n)
    return 1


@pytest.mark.parametrize("policy", [POLICY_MAP, POLICY_COPY])
def test_a_dead_store_is_its_own_guests_trouble(policy: int, tmp_path: Path) -> None:
    """Its ring has what it may have of blocks and bounce pages, and wants more; the other ring's large requests go on,
    and each of them has not to look at the dead one again."""
    queues = Queues(tmp_path / "journal", policy, bounce=16 * 64, blocks=64)
    for k in range(16):
        queues.bed.pages[7].view(blkif.SEGMENT)[k] = (k % 2, k % 8, k % 8)
    good = int(queues.rings[0]["step"])
    queues.rings[0]["step"] = address_of(never_answered)
    queues.put_indirect(0, NR, gref=7)
    queues.run(10)
    assert queues.taken(0) == 7 and queues.bed.worker[0]["starved"] == 0
    for _ in range(3):
        queues.put_indirect(1, 8, gref=7)
        mark_ready(queues.bed.wa, queues.ra(1))
        queues.run(1)
        assert queues.rings[0]["ready"] == 0
        queues.run(8)
        assert queues.answers(1) == [0] * 8
    assert queues.taken(0) == 7 and queues.answers(0) == []
    queues.rings[0]["step"] = good  # it is back: what it had comes back as well
    for k, head in enumerate(queues.reqs[0].array(BLK_REQ, NR)["head"].view(REQ).ravel()):
        if head["ring"]:
            complete(queues.reqs[0].address + k * BLK_REQ.itemsize, int(head["nbytes"]))
    queues.run(20)
    assert len(queues.answers(0)) == NR
    w = queues.bed.worker[0]
    assert (int(w["blocks_n"]), int(w["bounce_n"])) == (64, 16 * 64)
    assert not queues.rings["blocks"].any() and not queues.rings["bounced"].any()
    queues.bed.check()


def die_with_a_barrier_waiting(path: Path) -> Queues:
    """Ring 1 has writes under way, and a barrier of ring 0 waits for them, when the process dies."""
    first = Queues(path)
    first.put(1, blkif.OP_WRITE, [0], 3)
    loop._serve(first.bed.wa)
    first.put(0, blkif.OP_WRITE_BARRIER, [1])
    mark_ready(first.bed.wa, first.ra(0))
    loop._serve(first.bed.wa)
    assert (first.taken(0), first.taken(1)) == (1, 3) and first.rings[0]["waiting"] != 0
    return first


def test_a_barrier_and_what_it_waits_for_are_taken_over(tmp_path: Path) -> None:
    first = die_with_a_barrier_waiting(tmp_path / "journal")
    second = Queues(tmp_path / "journal", before=first)
    second.run(10)
    assert second.answers(0) == [0] and second.answers(1) == [0, 0, 0]
    second.bed.check()


def test_what_was_taken_over_and_not_begun_does_not_keep_a_ring(tmp_path: Path) -> None:
    """The ring is to go before its turn has come."""
    first = die_with_a_barrier_waiting(tmp_path / "journal")
    second = Queues(tmp_path / "journal", before=first)
    for q in range(RINGS):
        second.detach(q)
    second.run(3)
    assert (second.rings["state"] == RING_DETACHED).all()
    # It is in the journal as it was.
    third = Queues(tmp_path / "journal", before=second)
    third.run(10)
    assert third.answers(0) == [0] and third.answers(1) == [0, 0, 0]


@pytest.mark.parametrize("handed_over", [0, 1])
def test_a_barrier_that_waits_when_its_ring_goes(tmp_path: Path, handed_over: int) -> None:
    """At the end of the connection it fails; at the end of the process the next one does it, and nobody hears of it."""
    first = die_with_a_barrier_waiting(tmp_path / "journal")
    first.disk[0]["handed_over"] = handed_over
    if handed_over:
        first.put(1, blkif.OP_WRITE, [0], 2)  # these come too late
    for q in range(RINGS):
        first.detach(q)
        first.run(3)
        assert first.rings[q]["state"] == RING_DETACHED
    assert first.answers(1) == [0, 0, 0]
    assert not first.bed.mapped.any()
    first.bed.check()
    if not handed_over:
        assert first.answers(0) == [blkif.RSP_ERROR]
        return
    assert first.answers(0) == []
    second = Queues(tmp_path / "journal", before=first)
    second.run(10)
    assert second.answers(0) == [0] and second.answers(1) == [0] * 5
    second.bed.check()


def test_a_null_disk_shows_nobody_what_was_in_a_bounce_page(tmp_path: Path) -> None:
    """Bounce pages are everybody's: another guest's data may be in them."""
    queues = Queues(tmp_path / "journal", POLICY_COPY)
    queues.disk[0]["store"] = STORE_NULL
    queues.bed.bounce[:] = 0xAA
    queues.bed.pages[2] = 0xBB
    queues.put(0, blkif.OP_READ, [2])
    queues.run(2)
    assert queues.answers(0) == [0]
    assert not queues.bed.pages[2].any()


def test_a_pass_takes_one_call_of_each_kind(tmp_path: Path) -> None:
    """Whatever the number of its requests; and all is unmapped before the guest can see an answer."""
    queues = Queues(tmp_path / "journal")
    counts: Any = queues.bed.counts[0]
    counts["watch"] = queues.indices(0)[2:].ctypes.data  # rsp_prod
    for round, operation in enumerate([blkif.OP_WRITE, blkif.OP_READ]):
        queues.put(0, operation, [0, 1, 2, 3], 3)
        queues.put(0, operation, [4], 3)
        queues.run(1)
        assert queues.answers(0) == [0] * 6
        assert queues.bed.calls() == {"map": round + 1, "unmap": round + 1, "copy": 0}
        assert counts["watched"] == 6 * round and not queues.bed.mapped.any()
    queues.bed.check()


def test_a_pass_is_copied_by_one_call_each_way(tmp_path: Path) -> None:
    """Writes when they are taken, reads when they are done; a page that is refused fails its own request."""
    queues = Queues(tmp_path / "journal", POLICY_COPY, bounce=16 * 11)
    queues.bed.refused[4] = -3
    for operation, calls in ((blkif.OP_WRITE, 1), (blkif.OP_READ, 2)):
        for grefs in ([0, 1], [2, 4], [3], [5, 6, 7], [1]):
            queues.put(0, operation, grefs)
        queues.run(1)
        assert queues.answers(0) == [blkif.RSP_OKAY, blkif.RSP_ERROR, *[blkif.RSP_OKAY] * 3]
        assert queues.bed.calls() == {"map": 0, "unmap": 0, "copy": calls}
    assert queues.bed.worker[0]["bounce_n"] == 16 * 11 and queues.stats[0]["map_failures"] == 2
    queues.bed.check()


@pytest.mark.parametrize("policy", [POLICY_MAP, POLICY_PERSISTENT])
def test_indirect_pages_are_kept_with_persistent_grants(policy: int, tmp_path: Path) -> None:
    """As Linux does, so that a request takes no grant operation; without, one copy for all of a pass."""
    queues = Queues(tmp_path / "journal", policy)
    queues.store[: 2 * PAGE] = 0x77
    segments = queues.bed.pages[7].view(blkif.SEGMENT)
    for k in range(16):
        segments[k]["gref"], segments[k]["first_sect"], segments[k]["last_sect"] = k % 2, k % 8, k % 8
    for round in range(3):
        queues.put_indirect(0, 1, gref=7)
        queues.run(1)
        assert queues.answers(0) == [0]
        assert queues.bed.calls()["copy"] == (0 if policy == POLICY_PERSISTENT else round + 1)
    assert set(queues.bed.pages[0][: PAGE // 8]) == {0x77}
    assert queues.bed.counts[0]["maps"] == (1 + 16 if policy == POLICY_PERSISTENT else 3 * 16)
    assert queues.bed.mapped.sum() == (3 if policy == POLICY_PERSISTENT else 0)
    queues.bed.check()


@pytest.mark.parametrize("bounce", [64, 2])
def test_what_may_not_be_mapped_is_copied(bounce: int, tmp_path: Path) -> None:
    """Two queues may have four and no pages mapped. Who finds no bounce pages waits, and nothing fails."""
    queues = Queues(tmp_path / "journal", bounce=bounce)
    queues.rings["pages_limit"] = [4, 0]
    for q, most in ((0, 4), (1, 0)):
        before = int(queues.bed.counts[0]["maps"])
        for operation, value in ((blkif.OP_WRITE, 0x31), (blkif.OP_READ, 0x32)):
            queues.store[: 2 * PAGE] = value
            queues.bed.pages[:] = np.arange(SLOTS)[:, None]
            for grefs in ([0, 1], [2], [3, 4], [5, 6]):  # two in the end, that the last one is seen
                queues.put(q, operation, grefs)
            queues.run(4)
            assert queues.answers(q) == [0] * 4
            if operation == blkif.OP_READ:
                assert (queues.bed.pages[:7] == value).all()
            else:
                assert set(queues.store[: 2 * PAGE].tolist()) == {5, 6}
        mapped = int(queues.bed.counts[0]["maps"]) - before
        assert (mapped > 0) == (most > 0)
        if bounce == 64:
            # Pages 0, 1, 2 of each pass; the request after them would be the fourth and fifth.
            assert mapped == 2 * min(most, 3) and queues.stats[q]["grants_copied"] == 2 * (7 - min(most, 3))
    assert not queues.rings["pages"].any() and queues.bed.worker[0]["bounce_n"] == bounce
    assert not queues.stats["errors"].any() and not queues.bed.mapped.any()
    queues.bed.check()
