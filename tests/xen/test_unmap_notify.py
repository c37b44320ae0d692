"""What the kernel does for who has mapped a page, or granted one, and is no more: a byte cleared, an event sent."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pvdrivers.platform import open_platform

from .system import sh, until

BYTE = 100


@pytest.fixture(scope="module")
def platform() -> Iterator[Any]:
    sh("modprobe", "xen-gntalloc")
    xen = open_platform("xen")
    yield xen
    xen.close()


@pytest.fixture
def ports(platform: Any) -> Iterator[tuple[Any, int, Any, int]]:
    """(handle, port, handle, port): two ends of one channel of dom0 with itself."""
    near, far = platform.open_events(), platform.open_events()
    port = near.alloc_unbound(platform.domid)
    other = far.bind_interdomain(platform.domid, port)
    for handle in (near, far):
        handle.wait(1)  # a port is pending when it is bound
    yield near, port, far, other
    near.close()
    far.close()


def test_by_who_has_mapped_it(platform: Any, ports: tuple[Any, int, Any, int]) -> None:
    near, port, _, other = ports
    pages = platform.pages.alloc(1)
    gref = platform.pages.grant(pages.frames[0], platform.domid)
    ctypes.memset(pages.address, 0x55, 4096)
    mapping = platform.grants.map(platform.domid, [gref])
    mapping.on_unmap(clear=BYTE, notify=other)
    assert ctypes.string_at(pages.address + BYTE, 1) == b"\x55" and near.wait(0) == []
    mapping.unmap()
    assert ctypes.string_at(pages.address, 4096).count(0) == 1
    assert ctypes.string_at(pages.address + BYTE, 1) == b"\0"
    assert near.wait(5) == [port]
    assert platform.pages.end(gref)
    pages.free()


GRANTER = """
import ctypes, sys
from pvdrivers.platform import open_platform
xen = open_platform("xen")
pages = xen.pages.alloc(1)
gref = xen.pages.grant(pages.frames[0], xen.domid)
ctypes.memset(pages.address, 0x55, 4096)
xen.pages.on_end(gref, clear=%d)
print(gref, flush=True)
sys.stdin.read()
"""


def test_by_who_has_granted_it_and_dies(platform: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", GRANTER % BYTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          cwd=os.getcwd(), text=True) as granter:  # fmt: skip
        assert granter.stdin is not None and granter.stdout is not None
        gref = int(granter.stdout.readline())
        with platform.grants.map(platform.domid, [gref]) as mapping:
            assert ctypes.string_at(mapping.address, 4096) == b"\x55" * 4096
            granter.kill()
            granter.wait(20)
            until(lambda: ctypes.string_at(mapping.address + BYTE, 1) == b"\0", 20, "its byte is cleared")
            assert ctypes.string_at(mapping.address, 4096).count(0) == 1
