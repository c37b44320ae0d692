"""A store made slow, so that the dead process's writes are still on their way when the next one starts.

Without the fence they would land after newer ones: the load writes each block again as soon as it is answered.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pvdrivers.claims import Claims
from pvdrivers.device import DeviceId
from pvdrivers.frontends.load import Load, Plan
from tests.storage.host import loop_device, throttle

from .bed import Bed, until

pytestmark = [pytest.mark.root, pytest.mark.slow]

TOP = Path(__file__).resolve().parents[2]
WITHOUT_LOCKS = TOP / "tests/storage/without_locks"
A_SECOND = 4  # so that what is under way takes longer than a start
DEPTH = 24
RANGE = 128 << 10


@pytest.mark.parametrize("io", ["auto", "threads"])
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
def test_writes_of_the_dead_do_not_land_on_newer_ones(
    bed: Callable[..., Bed], tmp_path: Path, io: str, locks: bool
) -> None:
    """On file systems with locks and without."""
    image = tmp_path / "slow.img"
    image.write_bytes(bytes(8 << 20))
    with loop_device(image) as device, throttle(device, 10_000, A_SECOND) as group:
        b = bed("--io", io)
        extra = {} if locks else {"PYTHONPATH": f"{WITHOUT_LOCKS}:{TOP}", "WITH_LOCKS": str(b.run_dir / "fence")}
        b.serve(group, **extra)
        disk = b.disk(device, mode="w" if locks else "w!", queues=1, ring_order=0)  # w: O_EXCL, a fence as well
        before = b.frontend()
        load = Load(disk, Plan(depth=DEPTH, write_percent=90, verify="all", length=RANGE, again_percent=90))
        load.start()
        until(lambda: load.snapshot().requests > 8)
        assert b.backend is not None
        killed = time.monotonic()
        # Not waited for: it ends when its writes have landed, and the next one is not to depend on that.
        b.backend.popen.send_signal(signal.SIGKILL)
        first = b.backend
        b.serve(**extra)
        seen = load.snapshot().requests
        until(lambda: load.snapshot().requests > seen + 500, timeout=60)
        if io == "auto":
            assert time.monotonic() - killed > 0.5, "nothing was under way: this shows nothing"
        load.stop()
        result = load.wait(60)
        assert result.right and result.requeues == 0, result
        time.sleep(2 * DEPTH / A_SECOND)  # whatever was to land late has landed
        assert ("a restart waits by those of the run directory" in b.log.read_text()) == (not locks)
        check = Plan(requests=RANGE // 4096, verify="all", length=RANGE, random=False)
        assert Load(disk, check, load.ledger).run(60).right
        assert b.frontend() == before
        first.end()
        disk.close()
        b.disks.remove(disk)
        b.backend.end()  # before its device goes


IMPATIENT = """
import time
from pvdrivers import handover
from pvdrivers.worker.pool import WorkerPool

handover.SECONDS = 0.5
stop = WorkerPool.stop

def stop_and_stay(self, **how):
    stop(self, **how)
    time.sleep(0.2)  # in which other threads could do what they must not

WorkerPool.stop = stop_and_stay
"""


@pytest.mark.parametrize("io", ["auto", "threads"])
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
def test_a_stop_that_does_not_wait_for_all_writes(
    bed: Callable[..., Bed], tmp_path: Path, io: str, locks: bool
) -> None:
    """Time is up, and requests are under way: these are waited for by who comes next, as if the daemon had died."""
    image = tmp_path / "slow.img"
    image.write_bytes(bytes(8 << 20))
    without = "from tests.storage.no_locks import take_away\nimport os\ntake_away(os.environ['WITH_LOCKS'])\n"
    (tmp_path / "sitecustomize.py").write_text(IMPATIENT + (not locks) * without)
    with loop_device(image) as device, throttle(device, 10_000, A_SECOND) as group:
        b = bed("--io", io)
        extra = {"PYTHONPATH": f"{tmp_path}:{TOP}", "WITH_LOCKS": str(b.run_dir / "fence")}
        b.serve(group, **extra)
        disk = b.disk(device, mode="w" if locks else "w!", queues=1, ring_order=0)
        before = b.frontend()
        load = Load(disk, Plan(depth=DEPTH, write_percent=90, verify="all", length=RANGE, again_percent=90))
        load.start()
        until(lambda: load.snapshot().requests > 8)
        assert b.backend is not None
        first = b.backend
        first.popen.send_signal(signal.SIGTERM)
        until(lambda: "is left as it is: it did not finish within 0.5 s" in b.log.read_text())
        b.serve(**extra)
        seen = load.snapshot().requests
        until(lambda: load.snapshot().requests > seen + 500, timeout=60)
        load.stop()
        result = load.wait(60)
        assert result.right and result.requeues == 0, result
        time.sleep(2 * DEPTH / A_SECOND)  # whatever was to land late has landed
        check = Plan(requests=RANGE // 4096, verify="all", length=RANGE, random=False)
        assert Load(disk, check, load.ledger).run(60).right
        assert b.frontend() == before
        text = b.log.read_text()
        assert "while disconnecting" not in text and "while handing over" not in text and "Traceback" not in text
        assert first.end() == 0
        disk.close()
        b.disks.remove(disk)
        b.backend.end()


def test_who_waits_for_whom(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """A write through the page cache is done by a thread of the kernel's that has all files of its process: until it
    ends, the dead daemon has its claims and ports, and none of its disks can be taken over. Another daemon's can."""
    paths = [tmp_path / name for name in ("slow.img", "same.img", "other.img")]
    for path in paths:
        path.write_bytes(bytes(8 << 20))
    with loop_device(paths[0]) as device, throttle(device, 10_000, 1) as group:
        b = bed("--domain", "1", "2")
        words = [b.words, ("--domain", "3")]
        first = [b.serve(group)]
        b.words = words[1]
        first.append(b.serve())
        slow = f"{device},direct=no,cache=writethrough"
        disks = [b.disk(what, queues=1, ring_order=0) for what in (slow, str(paths[1]), str(paths[2]))]
        plans = [Plan(depth=16, write_percent=100, length=4 << 20)] + [Plan(depth=4, length=1 << 20)] * 2
        loads = [Load(disk, plan) for disk, plan in zip(disks, plans)]
        for load in loads:
            load.start()
        until(lambda: all(load.snapshot().requests > 2 for load in loads))
        for process in first:
            process.popen.send_signal(signal.SIGKILL)
        seen = [load.snapshot().requests for load in loads]
        again = [b.serve()]
        until(lambda: loads[2].snapshot().requests > seen[2] + 100)
        claims, same = Claims(b.run_dir), DeviceId(0, "vbd", 2, 51712, "")
        held = claims.held(same)  # in this order: what is held by a thread that waits is seen before its end
        assert waits(first[0].popen.pid), "nothing is under way: this shows nothing"
        assert held, "though nothing of its own is under way"
        until(lambda: not waits(first[0].popen.pid), 60)
        until(lambda: not claims.held(same))
        b.words = words[0]
        again.append(b.serve())
        until(lambda: all(load.snapshot().requests > before + 2 for load, before in zip(loads, seen)), 60)
        for load in loads:
            load.stop()
            assert load.wait(60).right
        for disk in disks:
            disk.close()
        b.disks.clear()
        for process in (*first, *again):
            process.end()


def waits(pid: int) -> bool:
    """Whether a thread of a process waits for a disk."""
    states = []
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            states.append(task.read_text().rpartition(")")[2].split()[0])
    return "D" in states
