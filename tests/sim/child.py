"""What other processes do in these tests: ``python -m tests.sim.child WHAT RUN_DIR DOMID ...``."""

from __future__ import annotations

import ctypes
import sys
import time

import numpy as np

from pvdrivers import sim
from pvdrivers.invoke import invoke
from pvdrivers.platform import GRANT_OP, OP_READONLY
from pvdrivers.sim import grant_seam


def mapped(run_dir: str, domid: int, gref: int, flags: int, strict: bool) -> tuple[int, np.ndarray, sim.SimPlatform]:
    platform = sim.open(run_dir, strict=strict)
    platform.prepare(domid)
    ops = np.zeros(1, GRANT_OP)
    ops["gref"], ops["domid"], ops["flags"] = gref, domid, flags
    failed = invoke(grant_seam.grant_map)(platform.grants.ctx, ops.ctypes.data, 1)
    assert not failed, int(ops["status"][0])
    return int(ops["address"][0]), ops, platform


def hold(run_dir: str, domid: int, gref: int) -> None:
    """Map a page, both ways, bind nothing, and wait to be killed."""
    _, _, platform = mapped(run_dir, domid, gref, 0, False)
    platform.grants.map(domid, [gref])
    print("mapped", flush=True)
    time.sleep(60)


def bind(run_dir: str, domid: int, port: int) -> None:
    """Bind a port, answer each event, and wait to be killed."""
    events = sim.open(run_dir).open_events()
    ours = events.bind_interdomain(domid, port)
    print("bound", flush=True)
    while True:
        if events.wait(60):
            events.notify(ours)


def use_after_unmap(run_dir: str, domid: int, gref: int) -> None:
    """In strict mode this dies by SIGSEGV."""
    address, ops, platform = mapped(run_dir, domid, gref, 0, True)
    ctypes.memset(address, 1, 4096)
    invoke(grant_seam.grant_unmap)(platform.grants.ctx, ops.ctypes.data, 1)
    print("unmapped", flush=True)
    ctypes.memset(address, 2, 1)
    print("still here", flush=True)


def use_after_python_unmap(run_dir: str, domid: int, gref: int) -> None:
    mapping = sim.open(run_dir, strict=True).grants.map(domid, [gref])
    ctypes.memset(mapping.address, 1, 4096)
    mapping.unmap()
    print("unmapped", flush=True)
    ctypes.memset(mapping.address, 2, 1)
    print("still here", flush=True)


def write_read_only(run_dir: str, domid: int, gref: int, strict: int) -> None:
    """A read-only map is read-only in both modes."""
    address, _, _ = mapped(run_dir, domid, gref, OP_READONLY, bool(strict))
    ctypes.string_at(address, 4096)
    print("read", flush=True)
    ctypes.memset(address, 2, 1)
    print("still here", flush=True)


def neighbour(run_dir: str, domid: int, gref: int) -> None:
    """In strict mode the page beside a mapped one cannot be touched."""
    address, _, _ = mapped(run_dir, domid, gref, 0, True)
    ctypes.memset(address, 1, 4096)
    print("written", flush=True)
    ctypes.string_at(address + 4096, 1)
    print("still here", flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))
