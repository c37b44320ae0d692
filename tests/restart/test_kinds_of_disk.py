"""What the real backend says of a disk in `info` (blkif.h, VDISK_*), and that it means it; resized live."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers.frontends.blkfront import Blkfront
from pvdrivers.frontends.load import Load, Plan
from rings import blkif

from .bed import Bed, until

SIZE = 1 << 20


@pytest.mark.parametrize(
    "options, mode, flags",
    [
        ("", "w", 0),
        ("", "r", blkif.VDISK_READONLY),
        (",removable=on", "w", blkif.VDISK_REMOVABLE),
        (",cdrom=on", "r", blkif.VDISK_CDROM | blkif.VDISK_READONLY),
    ],
)
def test_info(bed: Callable[..., Bed], tmp_path: Path, options: str, mode: str, flags: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    b = bed()
    b.serve()
    disk = b.disk(f"{image}{options}", mode=mode)
    assert disk.info.flags == flags
    assert disk.read(4096, 4096) == image.read_bytes()[4096:8192]
    if flags & blkif.VDISK_READONLY:
        with pytest.raises(OSError) as refused:
            disk.write(0, bytes(4096))
        assert refused.value.errno == errno.EROFS
    else:
        disk.write(0, bytes(4096))


def test_resized_live(bed: Callable[..., Bed], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    b = bed()
    b.serve()
    disk: Blkfront = b.disk(str(image))
    with pytest.raises((OSError, ValueError)):
        disk.read(SIZE, 4096)
    os.truncate(image, 2 * SIZE)
    assert b.backend is not None
    b.backend.popen.send_signal(signal.SIGHUP)
    until(lambda: disk.info.size == 2 * SIZE)
    disk.write(SIZE, b"x" * 4096)
    assert disk.read(SIZE, 4096) == b"x" * 4096


def test_resized_before_its_guest_connects(bed: Callable[..., Bed], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    b = bed()
    b.serve()
    disk = b.unconnected(str(image))
    until(lambda: b.dom0.store.read("/local/domain/0/backend/vbd/1/51712/state") == b"2")
    os.truncate(image, 2 * SIZE)
    disk.connect(timeout=30)
    assert disk.info.size == 2 * SIZE


def test_another_disk_is_named_while_no_daemon_runs(bed: Callable[..., Bed], tmp_path: Path) -> None:
    """What was under way is of the disk that the guest is connected to, and goes to no other."""
    images = tmp_path / "first.img", tmp_path / "other.img"
    for image in images:
        image.write_bytes(bytes(SIZE))
    b = bed()
    b.serve()
    disk = b.disk(str(images[0]))
    load = Load(disk, Plan(depth=8, write_percent=100, verify="all", length=SIZE))
    load.start()
    until(lambda: load.snapshot().requests > 100)
    b.kill()
    back = "/local/domain/0/backend/vbd/1/51712"
    b.dom0.store.write(f"{back}/params", str(images[1]))
    b.serve()
    error = "/local/domain/0/error/backend/vbd/1/51712/error"
    until(lambda: b.dom0.store.read(error) is not None)
    said = b.dom0.store.read(error).decode()
    assert f"names file:{images[1]}, and its guest is connected to file:{images[0]}" in said
    assert b.dom0.store.read(f"{back}/state") == b"4"
    b.dom0.store.write(f"{back}/params", f"{images[0]},policy=map")  # the same disk, with another option
    seen = load.snapshot().requests
    until(lambda: load.snapshot().requests > seen + 100)
    until(lambda: b.dom0.store.read(error) is None)
    load.stop()
    result = load.wait(60)
    assert result.right and result.requeues == 0
    assert images[1].read_bytes() == bytes(SIZE)
