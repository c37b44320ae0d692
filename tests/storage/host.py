"""Pieces of a host that need root: mounts, loop devices, throttles. Each is undone when its block ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import lacking


def run(*argv: str | os.PathLike[str]) -> str:
    """The output of a program. Raises CalledProcessError."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@contextlib.contextmanager
def tmpfs(where: Path, size: str) -> Iterator[Path]:
    """A small tmpfs."""
    where.mkdir()
    try:
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where)
    except subprocess.CalledProcessError as e:
        lacking(f"tmpfs cannot be mounted: {e.stderr.strip()}")
    try:
        yield where
    finally:
        run("umount", "-l", where)


@contextlib.contextmanager
def loop_device(image: Path, *options: str) -> Iterator[str]:
    """A loop device over a file."""
    if shutil.which("losetup") is None:
        lacking("losetup is not installed: apt-get install mount")
    try:
        device = run("losetup", "--find", "--show", *options, image)
    except subprocess.CalledProcessError as e:
        lacking(f"no loop devices here: {e.stderr.strip()}")
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def throttle(device: str, reads: int, writes: int) -> Iterator[Path]:
    """A control group (write a pid to the yielded cgroup.procs) that does so few I/Os a second on a block device."""
    st = os.stat(device)
    number = f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
    name = f"pvdrivers-test-{os.getpid()}"
    v1, v2 = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")
    try:
        if (v1 / "cgroup.procs").exists():
            group = v1 / name
            group.mkdir()
            (group / "blkio.throttle.read_iops_device").write_text(f"{number} {reads}")
            (group / "blkio.throttle.write_iops_device").write_text(f"{number} {writes}")
        else:
            with contextlib.suppress(OSError):
                (v2 / "cgroup.subtree_control").write_text("+io")
            group = v2 / name
            group.mkdir()
            (group / "io.max").write_text(f"{number} riops={reads} wiops={writes}")
    except OSError as e:
        lacking(f"control groups cannot slow a block device here: {e}")
    try:
        yield group / "cgroup.procs"
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)
