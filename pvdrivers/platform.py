"""The seam between the drivers and Xen, twice.

The Python seam (the Protocols below) serves the control plane. The JIT seam (SEAM, a table of compiled addresses)
serves the worker. Both have two implementations, pvdrivers.sim and pvdrivers.xen, that pass the same contract tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from .errors import PlatformError

PAGE_SIZE = 4096

# Status of one grant operation: xen/include/public/grant_table.h, GNTST_*.
GNTST_okay = 0
GNTST_general_error = -1
GNTST_bad_domain = -2
GNTST_bad_gntref = -3
GNTST_bad_handle = -4
GNTST_no_device_space = -7
GNTST_permission_denied = -8
GNTST_bad_page = -9
GNTST_bad_copy_arg = -10
GNTST_eagain = -12
GNTST_no_space = -13

# GRANT_OP.flags
OP_READONLY = 1  # map: GNTMAP_readonly
OP_TO_GUEST = 2  # copy: from local memory into the granted page; otherwise out of it
OP_BETWEEN = 4  # copy: what `address` says is no local memory but a granted page as well, see granted()

GRANT_OP = np.dtype(
    [
        ("address", "i8"),  # map: out, where the page is now; copy: in, the local bytes, or the other granted ones
        ("handle", "i8"),  # map: out; unmap: in
        ("gref", "u4"),
        ("domid", "u2"),  # the granting domain
        ("flags", "u2"),
        ("offset", "u2"),  # copy: first byte within the granted page
        ("length", "u2"),  # copy: bytes; offset + length <= 4096
        ("status", "i2"),  # out: GNTST_*
        ("pad", "u2"),
    ],
    align=True,
)
"""One grant operation, 32 bytes. Operations are given in batches; each has a status of its own."""


def granted(gref: int, offset: int, domid: int) -> int:
    """GRANT_OP.address of an OP_BETWEEN: bytes from `offset` on in a granted page, as gntdev.h packs it."""
    return gref | offset << 32 | domid << 48


SEAM = np.dtype(
    [
        ("grant_ctx", "i8"),
        ("grant_map", "i8"),  # f(grant_ctx, ops, n, 0) -> how many failed
        ("grant_unmap", "i8"),  # f(grant_ctx, ops, n, 0) -> how many failed
        ("grant_copy", "i8"),  # f(grant_ctx, ops, n, 0) -> how many failed
        ("event_ctx", "i8"),
        ("event_notify", "i8"),  # f(event_ctx, port, 0, 0) -> 0 or -errno
        ("event_deliver", "i8"),  # f(event_ctx, token, n, 0): the fd behind `token` became readable; n > 0: so many
        # bytes of it were read already, to EventChannel.shared_read
        ("event_next", "i8"),  # f(event_ctx, 0, 0, 0) -> a pending, unmasked port, now cleared; or -1
        # f(event_ctx, port, later, u) -> 0: the port may be delivered again; with `later` not before a call without,
        # and port 0 is none. u: 0, or the worker's URING, which the caller enters before it sleeps
        ("event_unmask", "i8"),
        ("offer_ctx", "i8"),  # a frontend's side of grants; 0 where pages are granted once and for all
        ("offer_grant", "i8"),  # f(offer_ctx, gref, frame, domid | readonly << 16) -> 0
        ("offer_end", "i8"),  # f(offer_ctx, gref, 0, 0) -> 0, or -EBUSY while it is mapped
    ],
    align=True,
)
"""The JIT seam of one worker: contexts and addresses, called with rings.atomics.call."""


class Mapping(Protocol):
    """Granted pages, mapped side by side. A context manager; unmapped exactly once."""

    address: int
    pages: int

    def unmap(self) -> None: ...


class GrantTable(Protocol):
    """The mapper's side."""

    def map(self, domid: int, grefs: Sequence[int], *, readonly: bool = False) -> Mapping:
        """Map `grefs` of `domid` into one contiguous range. Raises PlatformError naming gref and status."""

    def close(self) -> None: ...


class Pages(Protocol):
    """Pages of our own that can be granted."""

    address: int
    frames: Sequence[int]

    def free(self) -> None: ...


class GuestPages(Protocol):
    """The granting side: what a frontend needs."""

    dynamic: bool
    """True if SEAM.offer_grant works: any page to any gref at any time (the embedded Xen; not gntalloc). Without it a
    page has one grant at a time."""
    sees_mappings: bool
    """Whether end() can tell that a page is still mapped (the embedded Xen; not gntalloc, whose kernel looks after
    such a page until it is not)."""

    def alloc(self, count: int) -> Pages:
        """`count` zeroed pages, contiguous in our address space. Raises PlatformError when there is no room."""

    def grant(self, frame: int, domid: int, *, readonly: bool = False) -> int:
        """A new gref that lets `domid` map the page `frame`."""

    def reserve(self, count: int) -> Sequence[int]:
        """`count` unused grefs for SEAM.offer_grant. PlatformError if not `dynamic` or none are left."""

    def end(self, gref: int) -> bool:
        """Take a grant back and free its gref. False, and nothing done, while a backend has it mapped."""


class EventChannel(Protocol):
    """One handle on event channels. A port can only be notified through the handle that bound it."""

    def alloc_unbound(self, remote_domid: int) -> int: ...

    def bind_interdomain(self, remote_domid: int, remote_port: int) -> int: ...

    def unbind(self, port: int) -> None: ...

    def notify(self, port: int) -> None: ...

    def source(self, port: int) -> tuple[int, int]:
        """(fd to poll, token for SEAM.event_deliver) of a port of this handle. Edges are enough unless it is shared."""

    def pending(self) -> list[int]:
        """Deliver and take what is pending now: ports, each once. For control code and tests."""

    def wait(self, timeout: float | None = None) -> list[int]: ...

    def close(self) -> None: ...


class XenStore(Protocol):
    """A connection to xenstore (pvdrivers.xenstore.XenStoreClient is the one implementation)."""

    timeout: float
    """Seconds to wait for a reply before the connection is given up."""

    def fileno(self) -> int: ...
    def read(self, path: str, tx: int = 0) -> bytes | None: ...
    def write(self, path: str, value: bytes | str | int, tx: int = 0) -> None: ...
    def mkdir(self, path: str, tx: int = 0) -> None: ...
    def rm(self, path: str, tx: int = 0) -> None: ...
    def ls(self, path: str, tx: int = 0) -> list[str] | None: ...
    def get_perms(self, path: str, tx: int = 0) -> list[str]: ...
    def set_perms(self, path: str, perms: Sequence[str], tx: int = 0) -> None: ...
    def watch(self, path: str, token: str) -> None: ...
    def unwatch(self, path: str, token: str) -> None: ...
    def events(self) -> list[tuple[str, str]]: ...
    def transaction(self, fn: Callable[[int], Any], *, tries: int = 64, wait: bool = True) -> Any: ...
    def close(self) -> None: ...


class Platform(Protocol):
    """One domain's view of Xen."""

    domid: int
    store: XenStore
    grants: GrantTable
    pages: GuestPages
    grant_pages: int | None
    """How many granted pages this process should have mapped at the most; None: as many as it likes."""
    mapping_pages: int | None
    """... for the kernel's sake, which lets a process have so many mappings; None: the same."""
    late_unmap: bool
    """Whether a page can stay mapped after grant_unmap for as long as the kernel still holds a reference to it, as
    it may for a moment after direct I/O has completed."""

    def prepare(self, domid: int) -> None:
        """Open what the JIT seam needs to map pages of `domid`; GNTST_bad_domain without it."""

    def open_events(self) -> EventChannel:
        """A new handle: one for each worker."""

    def seam(self, events: EventChannel) -> np.ndarray:
        """A one-element SEAM array for a worker that owns `events`; keep it alive as long as the worker."""

    def domain_uuid(self, domid: int) -> str:
        """The uuid of a domain, "" if it is gone: one half of a journal's incarnation."""

    def close(self) -> None: ...


def open_platform(kind: str, **options: Any) -> Platform:
    """`kind` is "sim" (options: run_dir, and domid + token for a guest) or "xen". Raises PlatformError."""
    if kind not in ("sim", "xen"):
        raise PlatformError(f"platform {kind!r}: there are two, sim and xen")
    return cast(Platform, import_module(f"pvdrivers.{kind}").open(**options))
