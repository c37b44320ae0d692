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

from pvdrivers.storage.store import DrainingError, open_store
from pvdrivers.storage.uri import parse_disk

from .holder import REQUESTS
from .host import loop_device, throttle

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


def killed_with_requests_under_way(text: str, kind: str, group: Path) -> None:
    argv = [sys.executable, "-m", "tests.storage.holder", text, "vbd/1/51712", kind, str(group)]
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
    told: list[str] = []
    start = time.monotonic()
    with open_store(
        spec,
        run_dir="/nonexistent",
        identity="vbd/1/51712",
        recover=True,
        timeout=40,
        progress=lambda what, seconds: told.append(what),
    ) as store:
        waited = time.monotonic() - start
        before = landed(device)
        assert store.drain(0)
    time.sleep(2)
    assert landed(device) == before, "a write of the dead process landed after we began"
    if kind == "io_uring":
        assert before == REQUESTS
        assert waited > 0.5 and told
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


def _reap() -> None:
    while _children:
        _children.pop().wait(40)
