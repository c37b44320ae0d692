"""Rings of every flavour, and files to use them on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdrivers.errors import PlatformError
from pvdrivers.storage.uring import Uring

from .driver import FLAVOURS, open_ring


@pytest.fixture(params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> str:
    """The kind of ring under test."""
    name: str = request.param
    if name == "io_uring":
        try:
            Uring().close()
        except PlatformError as e:
            pytest.skip(str(e))
    return name


@pytest.fixture
def ring(flavour: str) -> Iterator[Uring]:
    with open_ring(flavour) as r:
        yield r


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A megabyte whose every 512 bytes are different."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(n.to_bytes(8, "little") * 64 for n in range(2048)))
    return path


@pytest.fixture
def fd(image: Path) -> Iterator[int]:
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)
