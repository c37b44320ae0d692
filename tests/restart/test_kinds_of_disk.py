"""What the real backend says of a disk in `info` (blkif.h, VDISK_*), and that it means it; resized live."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers.frontends.blkfront import Blkfront
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
