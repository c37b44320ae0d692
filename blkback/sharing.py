"""Who else has an image: a guest that migrates on this host is there twice for a while, with the same disk."""

from __future__ import annotations

import os

from pvdrivers.device import BackKeys, DeviceId
from pvdrivers.errors import ConfigError
from pvdrivers.migration import guest_of
from pvdrivers.platform import XenStore
from pvdrivers.storage.uri import DiskSpec
from pvdrivers.toolstack import DISK_KINDS

from .params import disk_of


def migrates_from(store: XenStore, ident: DeviceId, spec: DiskSpec) -> int | None:
    """The other domain with the uuid of this one that has the same image; None if there is none.

    All of it is read where the toolstack writes, and no guest.
    """
    guest = guest_of(store, ident.domid)
    if not guest or spec.scheme != "file":
        return None
    for kind in DISK_KINDS:
        top = f"/local/domain/{ident.backend_domid}/backend/{kind}"
        for domid in filter(str.isdigit, store.ls(top) or ()):
            if int(domid) == ident.domid or guest_of(store, int(domid)) != guest:
                continue
            for devid in filter(str.isdigit, store.ls(f"{top}/{domid}") or ()):
                other = DeviceId(ident.backend_domid, kind, int(domid), int(devid), "")
                if _same_image(store, other, spec):
                    return int(domid)
    return None


def _same_image(store: XenStore, other: DeviceId, spec: DiskSpec) -> bool:
    try:
        theirs = disk_of(BackKeys.read(store, other))
        return theirs is not None and theirs.scheme == "file" and os.path.samefile(theirs.path, spec.path)
    except (ConfigError, OSError):
        return False
