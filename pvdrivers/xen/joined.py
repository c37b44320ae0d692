"""The platform of a program that runs in a domain of the real Xen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pvdrivers.errors import PlatformError
from pvdrivers.platform import SEAM, EventChannel, GrantTable, GuestPages, Platform, XenStore
from pvdrivers.xenstore import XenStoreClient, default_path
from rings.jit import address_of

from . import event_seam, grant_seam, limits
from .events import XenEventChannel
from .grants import XenGrantTable
from .pages import XenGuestPages


class XenPlatform:
    """This domain. Implements platform.Platform."""

    late_unmap = True

    def __init__(self, store_path: str | None) -> None:
        """See pvdrivers.xen.open."""
        try:
            self.store: XenStore = XenStoreClient.connect(store_path or default_path())
        except OSError as e:
            raise PlatformError(str(e)) from e
        try:
            self.domid = _own_domid(self.store)
            pv = limits.is_pv()
            self._grants = XenGrantTable(whole=not pv)
        except BaseException:
            self.store.close()
            raise
        self._pages = XenGuestPages()
        self.grants: GrantTable = self._grants
        self.pages: GuestPages = self._pages
        self.grant_pages: int | None = limits.mappable_pages(pv)
        self.mapping_pages = limits.mapping_pages(limits.max_map_count())

    def prepare(self, domid: int) -> None:
        """Nothing to do: gntdev maps pages of any domain."""

    def open_events(self) -> XenEventChannel:
        """A new handle. Raises PlatformError."""
        return XenEventChannel()

    def seam(self, events: EventChannel) -> np.ndarray:
        """The JIT seam of a worker that owns `events`; keep it, `events` and this platform alive as long as that."""
        assert isinstance(events, XenEventChannel), "event channels of another platform"
        seam = np.zeros(1, SEAM)
        seam["grant_ctx"], seam["event_ctx"] = self._grants.context(), events.ctx
        for module, names in (
            (grant_seam, ("grant_map", "grant_unmap", "grant_copy")),
            (event_seam, ("event_notify", "event_deliver", "event_next", "event_unmask")),
        ):
            for name in names:
                seam[name] = address_of(getattr(module, name))
        return seam

    def domain_uuid(self, domid: int) -> str:
        """The uuid of a domain, "" if it is gone. In a driver domain, which may not read it, something else that is
        the same for as long as the guest lives."""
        home = f"/local/domain/{domid}"
        try:
            vm = self.store.read(home + "/vm")
            if vm is None and self.store.read(home) is None:
                return ""
        except PermissionError:
            vm = b""
        uuid = (vm or b"").rpartition(b"/")[2].decode("ascii", "replace")  # dom0 may have none
        return uuid or f"domain-{domid}"  # ids of domains are not used again within 32,752 of them

    def close(self) -> None:
        """Let go of everything: mappings, our own pages, the store."""
        self.store.close()
        self._grants.close()
        self._pages.close()


def _own_domid(store: XenStore) -> int:
    """Who we are. Raises PlatformError."""
    raw = store.read("domid")
    if raw is not None and raw.strip(b"\0").isdigit():
        return int(raw.strip(b"\0"))
    where = "/proc/xen/capabilities"
    try:
        with open(where) as file:
            if "control_d" in file.read():
                return 0
    except OSError:
        pass
    raise PlatformError(
        "xenstore does not say which domain this is (no node `domid`): in dom0, has xen-init-dom0 run?"
        " `systemctl start xenstored` or /etc/init.d/xen do that"
    )


if TYPE_CHECKING:
    _implements: type[Platform] = XenPlatform
