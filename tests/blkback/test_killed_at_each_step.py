"""A process with a real queue dies at each step of the journal; another recovers it. The store is memory that both see.

What the dead one had answered, or had only decided, must not be executed again: the guest uses those pages and
sectors for something else by then. All else must be executed, and everything answered once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blkback import attach, queue
from blkback.records import BLK_REQ, DISK
from pvdrivers.journal import Journal
from pvdrivers.platform import SEAM
from pvdrivers.storage.constants import STORE_MEMORY
from pvdrivers.storage.uring_layout import URING
from pvdrivers.worker import loop
from pvdrivers.worker.control import Memory
from pvdrivers.worker.journal import DONE, JOURNAL_RECORD, STEP_DONE, STEP_NOTIFIED, STEP_PUT, STEPS
from pvdrivers.worker.records import POLICY_COPY, POLICY_MAP, POLICY_PERSISTENT, RING
from rings import blkif
from rings import ring as ringlib
from rings.atomics import call
from rings.jit import address_of, kernel, seam_function
from tests.worker.bed import PAGE, Bed

NR, SLOTS, WRITES = 32, 8, 6
WHO = "who"
pytestmark = pytest.mark.jit_only("the process that dies is ended by compiled code")


@seam_function
def nobody_listens(ctx: int, port: int, b: int, c: int) -> int:
    """SEAM.event_notify."""
    return 0


@kernel
def serve(wa: int, ra: int, step: int, budget: int) -> None:
    """One visit of the loop."""
    call(step, wa, ra, budget, 0)
    loop._finish(wa)


class Shared:
    """The guest: a ring page, pages with data, and the disk; all in memory that a fork shares."""

    def __init__(self, start: int) -> None:
        self.memory = Memory(PAGE + (WRITES + WRITES) * PAGE)
        self.page = self.memory.bytes[:PAGE]
        self.indices = self.page[:16].view(np.uint32)  # req_prod, req_event, rsp_prod, rsp_event
        self.indices[:] = [start, start + 1 & 0xFFFFFFFF, start, start + 1 & 0xFFFFFFFF]
        self.data = self.memory.bytes[PAGE : PAGE + WRITES * PAGE].reshape(WRITES, PAGE)
        self.disk = self.memory.bytes[PAGE + WRITES * PAGE :].reshape(WRITES, PAGE)
        self.start = start
        self.answers: dict[int, int] = {}

    def send(self) -> None:
        """Write page k to block k, for all k."""
        self.data[:] = np.arange(1, WRITES + 1, dtype=np.uint8)[:, None]
        for k in range(WRITES):
            at = 64 + (self.start + k) % NR * blkif.ENTRY_SIZE_64
            row = self.page[at : at + blkif.ENTRY_SIZE_64].view(blkif.REQUEST_64)[0]
            row["operation"], row["nr_segments"], row["id"], row["sector_number"] = blkif.OP_WRITE, 1, 100 + k, 8 * k
            row["seg"][0]["gref"], row["seg"][0]["first_sect"], row["seg"][0]["last_sect"] = k, 0, 7
        self.indices[0] = (self.start + WRITES) & 0xFFFFFFFF

    def receive(self) -> list[int]:
        """The requests that were answered since."""
        new = []
        n = (int(self.indices[2]) - self.start) & 0xFFFFFFFF
        for index in range(len(self.answers), n):
            at = 64 + (self.start + index) % NR * blkif.ENTRY_SIZE_64
            row = self.page[at : at + blkif.RESPONSE_SIZE_64].view(blkif.RESPONSE_64)[0]
            k = int(row["id"]) - 100
            assert 0 <= k < WRITES and k not in self.answers, "answered twice, or what was not asked"
            assert row["operation"] == blkif.OP_WRITE
            self.answers[k] = int(row["status"])
            new.append(k)
        return new


class Process:
    """What a back end has in its own memory, filled in as blkback.attach does."""

    def __init__(self, shared: Shared, path: Path, policy: int, *, recover: bool) -> None:
        self.bed = bed = Bed(policy, grefs=WRITES, slots=SLOTS, max_ops=16, bounce=32)
        bed.pages = shared.data
        bed.counts[0]["pages"] = shared.data.ctypes.data
        journal = Journal.open(path, WHO, [NR]) if recover else Journal.create(path, WHO, [NR])
        assert journal is not None
        self.disk, self.end = np.zeros(1, DISK), np.zeros(1, ringlib.RING_END)
        self.uring, self.free = np.zeros(1, URING), np.zeros(NR, np.int32)
        self.reqs = Memory(NR * BLK_REQ.itemsize)
        self._fill(shared, journal)
        status = ringlib.back_end(self.end.ctypes.data, shared.page.ctypes.data, NR, blkif.ENTRY_SIZE_64)
        assert status != ringlib.CORRUPT
        busy: list[int] = []
        if recover:
            handle = SimpleNamespace(record=bed.ring[0], address=bed.ra)
            state = SimpleNamespace(handle=handle, keep=[self.end, self.reqs], worker=SimpleNamespace(address=bed.wa))
            device: Any = SimpleNamespace(journal=journal, ident="vbd-1-51712")
            busy = attach._recover(device, state, 0)  # type: ignore[arg-type]
        else:
            journal.reset(0, int(self.end[0]["cons"]))
        left = [i for i in range(NR) if i not in busy]
        self.free[: len(left)] = left
        bed.ring[0]["free_n"] = len(left)

    def _fill(self, shared: Shared, journal: Journal) -> None:
        bed, disk = self.bed, self.disk[0]
        seam = bed._keep[[isinstance(k, np.ndarray) and k.dtype == SEAM for k in bed._keep].index(True)]
        seam["event_notify"] = address_of(nobody_listens)
        disk["sectors"], disk["store"], disk["abi"] = WRITES * 8, STORE_MEMORY, blkif.ABI_64
        disk["memory"], disk["n_rings"] = shared.disk.ctypes.data, 1
        disk["rings"][0] = bed.ra
        bed.worker[0]["uring"], bed.worker[0]["heavy_limit"] = self.uring.ctypes.data, 1 << 30
        bed.worker[0]["reverse"] = 1
        ring: Any = bed.ring[0]
        ring["step"], ring["finish"] = address_of(queue.step), address_of(queue.finish)
        ring["end"], ring["device"] = self.end.ctypes.data, self.disk.ctypes.data
        ring["nr_ents"], ring["entry_size"] = NR, blkif.ENTRY_SIZE_64
        ring["journal"], ring["records"] = journal.queue_address(0), journal.records_address(0)
        ring["record_size"] = JOURNAL_RECORD.itemsize
        ring["reqs"], ring["req_size"] = self.reqs.address, BLK_REQ.itemsize
        ring["free"] = self.free.ctypes.data
        self.journal = journal
        assert ring.dtype == RING

    def run(self) -> None:
        """Three visits that take two requests each, and one more."""
        for _ in range(4):
            serve(self.bed.wa, self.bed.ra, address_of(queue.step), 2)


def killed(shared: Shared, path: Path, policy: int, step: int, count: int, *, recover: bool) -> bool:
    """A process that dies when it comes to `step` for the count-th time; False if it never did."""
    pid = os.fork()
    if pid == 0:
        try:
            process = Process(shared, path, policy, recover=recover)
            process.bed.worker[0]["kill_step"], process.bed.worker[0]["kill_count"] = step, count
            process.run()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the process failed by itself"
    return False


def warm(tmp_path: Path) -> None:
    """Everything is compiled before the first fork."""
    shared = Shared(0)
    shared.send()
    Process(shared, tmp_path / "warm", POLICY_MAP, recover=False).run()
    Process(shared, tmp_path / "warm", POLICY_MAP, recover=True)
    assert sorted(shared.receive()) == list(range(WRITES))


def decided(path: Path) -> list[int]:
    """Requests whose outcome is in the journal."""
    journal = Journal.open(path, WHO, [NR])
    assert journal is not None
    rows = journal.records(0)
    rows = rows[rows["state"] == DONE]
    return [int(row["payload"].view(blkif.REQUEST_64)[0]["id"]) - 100 for row in rows]


def used_for_something_else(shared: Shared, path: Path) -> set[int]:
    """The guest goes on with what it was told; nobody else may touch what is decided."""
    told = set(shared.receive()) | set(decided(path))
    for k in told:
        shared.data[k] = 200 + k
        shared.disk[k] = 220 + k
    return told


def die_and_recover(path: Path, policy: int, step: int, count: int, again: int) -> bool:
    """One guest whose back end dies, perhaps twice; whether it did."""
    shared = Shared(0xFFFFFFFD)
    shared.send()
    died = killed(shared, path, policy, step, count, recover=False)
    over = used_for_something_else(shared, path)
    if again:
        killed(shared, path, policy, again, 1, recover=True)
        over |= used_for_something_else(shared, path)
    last = Process(shared, path, policy, recover=True)
    last.run()
    shared.receive()
    assert shared.answers == dict.fromkeys(range(WRITES), 0)
    for k in range(WRITES):
        assert set(shared.disk[k].tolist()) == {220 + k if k in over else 1 + k}, "executed again, or never"
    assert last.bed.ring[0]["inflight"] == 0 and last.bed.ring[0]["free_n"] == NR
    last.bed.check()
    return died


POLICIES = {"map": POLICY_MAP, "persistent": POLICY_PERSISTENT, "copy": POLICY_COPY}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("step", STEPS, ids=list(STEPS.values()))
def test_killed_and_recovered(step: int, policy: int, tmp_path: Path) -> None:
    warm(tmp_path)
    assert die_and_recover(tmp_path / "journal", policy, step, 1, 0)
    assert die_and_recover(tmp_path / "journal", policy, step, 2, STEP_PUT)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=list(STEPS.values()))
def test_killed_later_and_again(step: int, tmp_path: Path) -> None:
    warm(tmp_path)
    for policy in POLICIES.values():
        for count in (1, 2, 3):
            for again in (STEP_DONE, STEP_PUT, STEP_NOTIFIED):
                assert die_and_recover(tmp_path / "journal", policy, step, count, again)
