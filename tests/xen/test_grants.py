"""What gntdev and gntalloc do beside mapping and granting, and what a batch must not make gntdev do."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdrivers.invoke import invoke
from pvdrivers.platform import GRANT_OP
from pvdrivers.xen import grant_seam
from pvdrivers.xen.grants import Context

from .system import until

BYTE = 100


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


def test_a_part_of_a_batch_is_unmapped_and_no_other_page(platform: Any, tmp_path: Path) -> None:
    """A mapping must not have all addresses of a huge page in it, or Linux has gntdev unmap more than was asked for."""
    n = 1600
    pages = platform.pages.alloc(n)
    ops = np.zeros(n, GRANT_OP)
    ops["gref"] = [platform.pages.grant(frame, platform.domid) for frame in pages.frames]
    ops["domid"] = platform.domid
    for k in range(n):
        ctypes.memmove(pages.address + k * 4096, struct.pack("=I", k), 4)
    context = Context(whole=False)
    assert invoke(grant_seam.grant_map)(context.address, ops.ctypes.data, n) == 0
    addresses = ops["address"].copy()
    gone: set[int] = set()
    with open(tmp_path / "out", "w+b", buffering=0) as out:
        for first in (0, 300, 601, 900, 1301):
            assert invoke(grant_seam.grant_unmap)(context.address, ops[first:].ctypes.data, 128) == 0
            gone |= set(range(first, first + 128))
            left = [k for k in range(n) if k not in gone]
            out.seek(0)
            for k in left:
                # By the kernel, to which a page that is not there is an error and no signal.
                assert out.write((ctypes.c_char * 4).from_address(int(addresses[k]))) == 4
            out.seek(0)
            assert list(struct.unpack(f"={len(left)}I", out.read(4 * len(left)))) == left
    context.close()
    for gref in ops["gref"]:
        assert platform.pages.end(int(gref))
    pages.free()
