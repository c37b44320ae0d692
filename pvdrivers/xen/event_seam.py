"""The seam functions of event channels on /dev/xen/evtchn. The context is the address of an EVENT_CTX.

The kernel masks a port when it has been notified, until it is written back: reading tells the ports, writing has them
delivered again (drivers/xen/evtchn.c). So a storm costs whoever makes it a visit each, and nobody an interrupt each.

A worker's io_uring reads for us (to `taken`, EventChannel.shared_read), and writes for us as it enters the kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.storage.uring_device import consumed, queue_write_quiet
from pvdrivers.syscalls import EINVAL, ioctl32, read, write
from pvdrivers.worker.records import TAG_UNMASK
from rings.atomics import i64, records, store32
from rings.jit import inline, kernel, seam_function

from .devices import IOCTL_EVTCHN_NOTIFY

PORTS_AT_ONCE = 1024
"""One read or write of evtchn takes a page."""

EVENT_CTX = np.dtype(
    [
        ("fd", "i8"),
        ("taken", "i8"),  # address of u4[PORTS_AT_ONCE]: what was read last
        ("at", "i8"),  # the next of them
        ("n", "i8"),  # how many there are
        ("later", "i8"),  # address of u4[PORTS_AT_ONCE]: ports that are to be written back
        ("later_n", "i8"),
        ("sent", "i8"),  # another such array: what an io_uring writes, or has written
        ("sent_at", "i8"),  # its SQE; -1 there was none yet
        ("calls", "i8"),  # system calls made here, for statistics
    ],
    align=True,
)
_PORT = np.dtype(np.uint32)
_LARGEST = 0x7FFF_FFFF


@inline
def _ctx(at: int) -> Any:
    return records(at, 1, EVENT_CTX)[0]


@kernel
def fill(ctx_at: int) -> int:
    """Read what is pending: how many ports, or -errno."""
    ctx = _ctx(ctx_at)
    ctx["at"], ctx["n"] = 0, 0
    ctx["calls"] += 1
    n = read(ctx["fd"], ctx["taken"], PORTS_AT_ONCE * 4)
    if n > 0:
        ctx["n"] = n >> 2
        return n >> 2
    return n


@seam_function
def event_notify(ctx_at: int, port: int, b: int, c: int) -> int:
    """SEAM.event_notify: 0 or -errno; -EINVAL or -ENOTCONN for a port that this handle does not have."""
    if port <= 0 or port > _LARGEST:
        return -EINVAL
    ctx = _ctx(ctx_at)
    ctx["calls"] += 1
    result = ioctl32(ctx["fd"], IOCTL_EVTCHN_NOTIFY, port)
    return result if result < 0 else 0


@seam_function
def event_deliver(ctx_at: int, token: int, n: int, c: int) -> int:
    """SEAM.event_deliver: the device became readable, or n bytes were read. 0; that there is nothing is no error."""
    ctx = _ctx(ctx_at)
    if n > 0:
        ctx["at"], ctx["n"] = 0, n >> 2
    elif ctx["at"] >= ctx["n"]:
        fill(ctx_at)
    return 0


@seam_function
def event_next(ctx_at: int, a: int, b: int, c: int) -> int:
    """SEAM.event_next: a pending port, masked until event_unmask; or -1."""
    ctx = _ctx(ctx_at)
    if ctx["at"] >= ctx["n"]:
        # As many as fit in one read: there may be more, and the device tells only of the first.
        if ctx["n"] < PORTS_AT_ONCE or fill(ctx_at) <= 0:
            ctx["n"] = 0
            return -1
    at = i64(ctx["at"])
    ctx["at"] = at + 1
    return i64(records(ctx["taken"], PORTS_AT_ONCE, _PORT)[at])


@inline
def _sent(ctx: Any, u: int) -> bool:
    """Have the io_uring at u write `later` as it enters the kernel next. False if it cannot."""
    if u == 0 or (ctx["sent_at"] >= 0 and not consumed(u, ctx["sent_at"])):
        return False  # what was sent before is still to be written: the kernel is short of memory
    at = queue_write_quiet(u, ctx["fd"], ctx["later"], ctx["later_n"] * 4, TAG_UNMASK)
    if at < 0:
        return False
    ctx["sent_at"] = at
    ctx["later"], ctx["sent"] = i64(ctx["sent"]), i64(ctx["later"])
    return True


@seam_function
def event_unmask(ctx_at: int, port: int, later: int, u: int) -> int:
    """SEAM.event_unmask: 0 or -errno. With `later` it waits for a call without, or for a page of ports."""
    ctx = _ctx(ctx_at)
    if port < 0 or port > _LARGEST:
        return -EINVAL
    if port != 0:
        store32(ctx["later"] + ctx["later_n"] * 4, port)
        ctx["later_n"] += 1
    if ctx["later_n"] == 0 or (later != 0 and ctx["later_n"] < PORTS_AT_ONCE):
        return 0
    result = i64(0)
    if not _sent(ctx, u):
        ctx["calls"] += 1
        result = write(ctx["fd"], ctx["later"], ctx["later_n"] * 4)
    ctx["later_n"] = 0
    return result if result < 0 else 0
