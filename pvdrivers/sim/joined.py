"""The platform of a program that has joined the embedded Xen."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvdrivers.errors import PlatformError
from pvdrivers.platform import SEAM, EventChannel, GrantTable, GuestPages, Platform, XenStore
from pvdrivers.xenstore import XenStoreClient
from rings.jit import address_of

from . import event_seam, grant_seam, wire
from .events import SimEventChannel, ports_of
from .grants import SimGrantTable
from .hypercall import HypercallError, Hypercalls
from .pages import SimGuestPages


class SimPlatform:
    """One handle of a domain of the embedded Xen. Implements platform.Platform."""

    grant_pages: int | None = None
    mapping_pages: int | None = None
    late_unmap = False

    def __init__(self, run_dir: Path, domid: int, token: bytes | None, *, strict: bool, abi: str) -> None:
        """See pvdrivers.sim.open."""
        self.run_dir = run_dir
        self.domid = domid
        self._token = token
        self._abi = abi
        self._limit = ports_of(abi)
        if not 0 <= domid < wire.DOMID_FIRST_RESERVED:
            raise PlatformError(f"domain {domid}: domain ids are 0 to {wire.DOMID_FIRST_RESERVED - 1}")
        self.hypercalls = Hypercalls(run_dir, domid, token, flags=wire.WANT_MEMORY | wire.WANT_STORE, limit=self._limit)
        memory, grants, store = self.hypercalls.hello.fds
        try:
            self.store: XenStore = XenStoreClient(socket.socket(fileno=store))
            self._pages = SimGuestPages(self.hypercalls, memory, grants)
            self._grants = SimGrantTable(self.hypercalls, strict=strict)
            self.pages: GuestPages = self._pages
            self.grants: GrantTable = self._grants
        finally:
            os.close(memory)
            os.close(grants)

    def prepare(self, domid: int) -> None:
        """Open what the JIT seam needs to map pages of `domid`. Raises PlatformError if it grants us nothing."""
        self._grants.prepare(domid)

    def open_events(self) -> SimEventChannel:
        """A new handle, with a connection of its own: its ports go when it does. Raises PlatformError."""
        return SimEventChannel(Hypercalls(self.run_dir, self.domid, self._token, limit=self._limit), self._abi)

    def seam(self, events: EventChannel) -> np.ndarray:
        """The JIT seam of a worker that owns `events`; keep it, `events` and this platform alive as long as that."""
        assert isinstance(events, SimEventChannel), "event channels of another platform"
        seam = np.zeros(1, SEAM)
        seam["grant_ctx"], seam["event_ctx"], seam["offer_ctx"] = self._grants.ctx, events.ctx, self._pages.ctx
        for module, names in (
            (grant_seam, ("grant_map", "grant_unmap", "grant_copy", "offer_grant", "offer_end")),
            (event_seam, ("event_notify", "event_deliver", "event_next", "event_unmask")),
        ):
            for name in names:
                seam[name] = address_of(getattr(module, name))
        return seam

    def domain_uuid(self, domid: int) -> str:
        """The uuid of a domain, "" if it is gone."""
        try:
            return self.hypercalls.call(wire.DOMAIN_INFO, domid).tail.decode("ascii")
        except HypercallError:
            return ""

    def close(self) -> None:
        """Leave: pins, claims and the store's connection are given up. A guest ends with its last handle."""
        self.store.close()
        self._grants.close()
        self._pages.close()
        self.hypercalls.close()


if TYPE_CHECKING:
    _implements: type[Platform] = SimPlatform
