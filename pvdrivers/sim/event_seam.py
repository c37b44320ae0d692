"""The seam functions of event channels. The context is the address of an EVENT_CTX."""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import EAGAIN, EINTR, EINVAL, eventfd_add
from rings.atomics import load_acquire32, records
from rings.jit import seam_function

from .event_kernels import (
    ABI_2L,
    EVENT_CTX,
    forget,
    mask,
    next_2l,
    next_fifo,
    set_pending,
    unmask_2l,
    unmask_fifo,
)


@seam_function
def event_notify(ctx_at: int, port: int, b: int, c: int) -> int:
    """SEAM.event_notify: 0, or -EINVAL for a port that this handle does not have."""
    ctx = records(ctx_at, 1, EVENT_CTX)[0]
    if port <= 0 or port >= ctx["limit"]:
        return -EINVAL
    fd = np.int64(load_acquire32(ctx["ports"] + port * 4)) - 1
    if fd < 0:
        return -EINVAL
    result = eventfd_add(fd, 1)
    # A full counter means that the other end has been told.
    return result if result < 0 and result != -EAGAIN else 0


@seam_function
def event_deliver(ctx_at: int, token: int, b: int, c: int) -> int:
    """SEAM.event_deliver: the eventfd of the port `token` was signalled. 0 or -EINVAL."""
    ctx = records(ctx_at, 1, EVENT_CTX)[0]
    if token <= 0 or token >= ctx["limit"]:
        return -EINVAL
    set_pending(ctx, token)
    return 0


@seam_function
def event_next(ctx_at: int, a: int, b: int, c: int) -> int:
    """SEAM.event_next: a pending port, now cleared and masked; or -1."""
    ctx = records(ctx_at, 1, EVENT_CTX)[0]
    if ctx["abi"] == ABI_2L:
        return next_2l(ctx)
    return next_fifo(ctx)


@seam_function
def event_unmask(ctx_at: int, port: int, b: int, c: int) -> int:
    """SEAM.event_unmask: 0 or -EINVAL.

    A port that became pending while it was masked is given by event_next again; and its eventfd is signalled, so
    that a worker which goes to sleep without asking wakes up.
    """
    ctx = records(ctx_at, 1, EVENT_CTX)[0]
    if port <= 0 or port >= ctx["limit"]:
        return -EINVAL
    again = unmask_2l(ctx["shared"], port) if ctx["abi"] == ABI_2L else unmask_fifo(ctx, port)
    if again != 0:
        fd = np.int64(load_acquire32(ctx["sources"] + port * 4)) - 1
        if fd >= 0:
            result = eventfd_add(fd, 1)
            return result if result == -EINTR else 0  # our peer holds this descriptor too, and may make it block
    return 0


@seam_function
def event_mask(ctx_at: int, port: int, b: int, c: int) -> int:
    """No delivery of a port until event_unmask. 0 or -EINVAL."""
    ctx = records(ctx_at, 1, EVENT_CTX)[0]
    if port <= 0 or port >= ctx["limit"]:
        return -EINVAL
    mask(ctx, port)
    return 0


@seam_function
def event_forget(ctx_at: int, port: int, b: int, c: int) -> int:
    """The port is closed: neither pending nor masked. 0 or -EINVAL."""
    ctx = records(ctx_at, 1, EVENT_CTX)[0]
    if port <= 0 or port >= ctx["limit"]:
        return -EINVAL
    forget(ctx, port)
    return 0
