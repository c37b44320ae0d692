"""The I/O of a killed process is waited for: by the writer of a disk, and by each reader of a shared one.

A loop device that does two I/Os a second, and a process that is killed with eight of them under way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers.errors import DeviceBusyError
from pvdrivers.storage import locks
from pvdrivers.storage.locks import Fence
from pvdrivers.storage.store import DrainingError, Store, open_store
from pvdrivers.storage.uri import parse_disk

from .holder import REQUESTS
from .host import loop_device, throttle
from .no_locks import take_away

ROOT = Path(__file__).resolve().parents[2]
A_SECOND = 2

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The device, and the cgroup.procs of those for whom it is slow."""
    image = tmp_path / "slow.img"
    image.write_bytes(bytes(1 << 20))
    with loop_device(image) as device, throttle(device, A_SECOND, A_SECOND) as group:
        yield device, group


def killed_with_requests_under_way(text: str, kind: str, group: Path, *run_dir: Path) -> None:
    argv = [sys.executable, "-m", "tests.storage.holder", text, "vbd/1/51712", kind, str(group), *map(str, run_dir)]
    p = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert p.stdout is not None
        said = [p.stdout.readline(), p.stdout.readline()]
        assert said == ["open\n", "submitted\n"]
    finally:
        p.kill()
    # Not waited for: it may take as long to end as its I/O does. Popen reaps it later.
    p.stdout.close()
    _children.append(p)


_children: list[subprocess.Popen[str]] = []


def landed(device: str) -> int:
    """How many of the eight writes are on the disk, past the page cache."""
    fd = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return sum(os.pread(fd, 4096, n * 8192) == bytes([n + 1]) * 4096 for n in range(REQUESTS))
    finally:
        os.close(fd)


@pytest.mark.parametrize("mode", ["w", "w!"])
@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_writes_of_the_dead_land_before_ours(slow: tuple[str, Path], kind: str, mode: str) -> None:
    device, group = slow
    text = f"{device},mode={mode}"
    spec = parse_disk(text)
    killed_with_requests_under_way(text, kind, group)
    with pytest.raises(DrainingError, match="is still held"):
        open_store(spec, run_dir="/nonexistent", identity="vbd/1/51712", recover=True, timeout=0)
    start = time.monotonic()
    with open_store(spec, run_dir="/nonexistent", identity="vbd/1/51712", recover=True, timeout=40) as store:
        waited = time.monotonic() - start
        before = landed(device)
        assert store.fd >= 0
    time.sleep(2)
    assert landed(device) == before, "a write of the dead process landed after we began"
    if kind == "io_uring":
        assert before == REQUESTS
        assert waited > 0.5
    _reap()


def test_reads_of_the_dead_on_a_shared_disk(slow: tuple[str, Path]) -> None:
    """flock is shared there: the fence alone tells."""
    device, group = slow
    spec = parse_disk(f"{device},mode=r")
    killed_with_requests_under_way(f"{device},mode=r", "io_uring", group)
    open_store(spec, run_dir="/nonexistent", identity="another").close()
    with pytest.raises(DrainingError, match="this very device"):
        open_store(spec, run_dir="/nonexistent", identity="vbd/1/51712", recover=True, timeout=0)
    open_store(spec, run_dir="/nonexistent", identity="vbd/1/51712", recover=True, timeout=40).close()
    _reap()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a daemon whose disks are where no file has locks."""
    path = tmp_path / "run"
    path.mkdir()
    monkeypatch.setattr(locks, "fcntl", locks.fcntl)  # put back at the end
    take_away(path / "fence")
    return path


@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_where_no_file_has_locks_the_process_has(slow: tuple[str, Path], run_dir: Path, kind: str) -> None:
    device, group = slow
    spec = parse_disk(f"{device},mode=w!")  # or exclusive use of a block device would be another fence
    killed_with_requests_under_way(f"{device},mode=w!", kind, group, run_dir)
    fence = Fence(run_dir)

    def again(identity: str = "vbd/1/51712", timeout: float = 0) -> Store:
        return open_store(spec, run_dir=run_dir, identity=identity, recover=True, timeout=timeout, fence=fence)

    with pytest.raises(DrainingError, match=f"{device} has no locks of its own.*: rm {fence.path}, and restart"):
        again()
    again("vbd/2/51712").close()  # a disk that the dead process did not have
    with again(timeout=40) as store:
        before = landed(device)
        assert "a restart waits by those of the run directory" in store.describe()
        with pytest.raises(DeviceBusyError, match=f"is held by process {os.getpid()}|by this process"):
            open_store(spec, run_dir=run_dir, identity="vbd/1/51712", recover=True, timeout=0, fence=Fence(run_dir))
    time.sleep(2)
    assert landed(device) == before, "a write of the dead process landed after we began"
    if kind == "io_uring":
        assert before == REQUESTS
    _reap()
    open_store(spec, run_dir=run_dir, identity="vbd/1/51712", fence=Fence(run_dir)).close()  # it was given back


def test_the_operator_may_go_on_without(slow: tuple[str, Path], run_dir: Path) -> None:
    """As the message says, and without the fence of a process as ever: nobody knows, nobody waits."""
    device, group = slow
    spec = parse_disk(f"{device},mode=w!")
    killed_with_requests_under_way(f"{device},mode=w!", "io_uring", group, run_dir)
    with open_store(spec, run_dir=run_dir, identity="vbd/1/51712", recover=True, timeout=0) as store:
        assert "no locks here, so a restart waits for nothing" in store.describe()
    (run_dir / "fence").unlink()
    fence = Fence(run_dir)
    open_store(spec, run_dir=run_dir, identity="vbd/1/51712", recover=True, timeout=0, fence=fence).close()
    _reap()


def _reap() -> None:
    while _children:
        _children.pop().wait(40)
