"""A guest that migrates on this host is there twice for a while: two domains, which are one to the toolstack."""

from __future__ import annotations

from .platform import XenStore


def guest_of(store: XenStore, domid: int) -> bytes:
    """What two domains have in common that are one guest: the path of its uuid, b"" if it is not to be known.

    Read where the toolstack writes, and no guest.
    """
    try:
        return (store.read(f"/local/domain/{domid}/vm") or b"").rstrip(b"\0")
    except PermissionError:  # a driver domain may not look
        return b""
