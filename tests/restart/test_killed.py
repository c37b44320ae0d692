"""The backend is killed under verified reads and writes, and started again; the guest notices nothing.

The load verifies every byte of what it reads, overwrites blocks again as soon as the first write is answered, and
reuses a page as soon as its read is: a request executed again after it was answered is found by one of these.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers.frontends.load import Load, Plan
from pvdrivers.worker.journal import STEPS

from .bed import Bed, until

SIZE = 32 << 20
RANGE = 4 << 20
LOAD = Plan(depth=24, write_percent=50, verify="all", length=RANGE)


def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return str(path)


def check_unnoticed(bed: Bed, load: Load, before: dict[str, bytes]) -> None:
    load.stop()
    result = load.wait(60)
    assert result.mismatch is None and result.first_error is None
    assert result.right and result.verified > 0
    assert result.requeues == 0, "the frontend had to do the journal's work"
    assert bed.frontend() == before, "state, grefs and ports of the guest are unchanged"
    # And what is there in the end is what was written last, read back through a backend that was never killed.
    again = Load(bed.disks[0], Plan(requests=RANGE // 4096, verify="all", length=RANGE, random=False), load.ledger)
    assert again.run(60).right


def goes_on(load: Load) -> None:
    seen = load.snapshot().requests
    until(lambda: load.snapshot().requests > seen + 200)


def kill_at_random(bed: Bed, image: str, kills: int, seed: int, options: str = "", **front: object) -> None:
    chance = random.Random(seed)
    bed.serve()
    disk = bed.disk(image + options, **front)
    Load(disk, Plan(depth=4, write_percent=50, verify="all", length=RANGE, requests=50)).run(60)  # compiled by now
    before = bed.frontend()
    load = Load(disk, LOAD)
    load.start()
    for _ in range(kills):
        goes_on(load)
        time.sleep(chance.uniform(0.0, 0.3))
        bed.kill()
        bed.serve(PVDRIVERS_TEST_REVERSE=str(chance.randrange(2)))
    goes_on(load)
    check_unnoticed(bed, load, before)


def test_killed_three_times(bed: Callable[..., Bed], tmp_path: Path) -> None:
    kill_at_random(bed(), image(tmp_path), 3, seed=1, queues=2, ring_order=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed, options, words, front", [
    (2, ",policy=map", (), {"queues": 1, "ring_order": 0}),
    (3, ",policy=copy", (), {"queues": 2, "ring_order": 2}),
    (4, ",direct=no", (), {"queues": 2, "ring_order": 4}),
    (5, "", ("--workers", "2"), {"queues": 2, "ring_order": 2}),
    (6, "", ("--io", "threads"), {"queues": 1, "ring_order": 1}),
    (7, "", (), {"queues": 1, "ring_order": 1, "abi": "x86_32", "indirect": False}),
    (8, "", (), {"queues": 1, "ring_order": 2, "trusted": False}),
    (14, ",direct=no", ("--coalesce", "2000"), {"queues": 2, "ring_order": 1}),
])
def test_killed_often(
    bed: Callable[..., Bed], tmp_path: Path, seed: int, options: str, words: tuple[str, ...], front: dict[str, object]
) -> None:
    kill_at_random(bed(*words), image(tmp_path), 8, seed, options, **front)


def kill_at_steps(bed: Bed, image: str, steps: list[int], seed: int) -> None:
    """Each backend dies at a step of the journal, some hundred times after it was reached first."""
    chance = random.Random(seed)
    bed.serve()
    disk = bed.disk(image, queues=2, ring_order=1)
    Load(disk, Plan(depth=4, write_percent=50, verify="all", length=RANGE, requests=50)).run(60)
    before = bed.frontend()
    load = Load(disk, LOAD)
    load.start()
    goes_on(load)
    bed.kill()
    for step in steps:
        bed.serve(PVDRIVERS_TEST_KILL=f"{step}:{chance.randrange(20, 200)}", PVDRIVERS_TEST_REVERSE="1")
        bed.died()
    bed.serve()
    goes_on(load)
    check_unnoticed(bed, load, before)


def test_killed_around_the_answer(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """Where it matters most: done is written, the response is put, it is pushed."""
    kill_at_steps(bed(), image(tmp_path), [5, 6, 7], seed=9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11, 12])
def test_killed_at_every_step(bed: Callable[..., Bed], tmp_path: Path, seed: int) -> None:
    kill_at_steps(bed(), image(tmp_path), list(STEPS), seed)


def test_without_the_journal_the_guest_notices(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """The proof that it is the journal that does it: without it the frontend has to queue everything again."""
    with pytest.raises(AssertionError, match="the frontend had to do"):
        kill_at_random(bed("--no-journal"), image(tmp_path), 1, seed=13, queues=1, ring_order=1)


def test_ended_in_order_and_started_again(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """SIGTERM drains and hands over; a planned restart is as unnoticed as a kill."""
    b = bed()
    b.serve()
    disk = b.disk(image(tmp_path), queues=2, ring_order=1)
    before = b.frontend()
    load = Load(disk, LOAD)
    load.start()
    for _ in range(2):
        goes_on(load)
        assert b.backend is not None
        assert b.backend.end() == 0
        b.serve()
    goes_on(load)
    check_unnoticed(b, load, before)


def test_a_disk_in_memory_outlives_its_backend(bed: Callable[..., Bed]) -> None:
    b = bed()
    b.serve()
    disk = b.disk("memory:16M", queues=1, ring_order=1)
    before = b.frontend()
    load = Load(disk, LOAD)
    load.start()
    goes_on(load)
    b.kill()
    b.serve()
    goes_on(load)
    check_unnoticed(b, load, before)
