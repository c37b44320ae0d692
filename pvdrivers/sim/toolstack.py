"""What xl and libxl do on the embedded Xen: make and end domains; and what pvdrivers.toolstack does with devices.

The store's directories and their permissions are those of libxl (libxl_create.c of Xen 4.17/4.20).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pvdrivers.platform import XenStore
from pvdrivers.toolstack import Value, attach, attach_vbd, detach, device_paths, devid_of

from . import wire
from .hypercall import Hypercalls

if TYPE_CHECKING:
    from .joined import SimPlatform

__all__ = [
    "Domain", "DomainState", "attach", "attach_vbd", "clean", "create_domain", "destroy", "detach", "device_paths",
    "devid_of", "list_domains",
]  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """A new guest. Whoever has the token may join as it; keep it from others."""

    domid: int
    token: bytes = field(repr=False)
    uuid: str


@dataclass(frozen=True)
class DomainState:
    """One line of list_domains()."""

    domid: int
    dying: bool
    pages: int
    handles: int
    uuid: str


def create_domain(dom0: SimPlatform, *, name: str = "", memory_mib: int = 64, grants: int = 0) -> Domain:
    """A domain with memory, a grant table of `grants` entries (0: 32768) and a place in the store.

    It lives until destroy(), or until the last process that joined it has left. Raises PlatformError.
    """
    reply = dom0.hypercalls.call(wire.CREATE_DOMAIN, memory_mib * 256, grants)
    domid, uuid = reply.values[0], reply.tail[16:].decode("ascii")
    domain = Domain(domid, reply.tail[:16], uuid)
    home, vm = f"/local/domain/{domid}", f"/vm/{uuid}"
    none, shown, own = ["n0"], ["n0", f"r{domid}"], [f"n{domid}"]

    def write(tx: int) -> None:
        # libxl__domain_make: the guest reads its directory, and writes only where it is given room.
        for path, perms in (
            (home, shown), (vm, shown), (f"/libxl/{domid}", none), (f"{home}/cpu", shown), (f"{home}/memory", shown),
            (f"{home}/device", shown), (f"{home}/control", shown), (f"{home}/data", own), (f"{home}/drivers", own),
            (f"{home}/feature", own), (f"{home}/attr", own), (f"{home}/error", own),
        ):  # fmt: skip
            dom0.store.mkdir(path, tx)
            dom0.store.set_perms(path, perms, tx)
        keys: dict[str, Value] = {
            f"{vm}/name": name or f"guest{domid}", f"{vm}/uuid": uuid, f"{home}/vm": vm,
            f"{home}/name": name or f"guest{domid}", f"{home}/domid": domid,
            f"{home}/memory/target": memory_mib * 1024, f"{home}/memory/static-max": memory_mib * 1024,
        }  # fmt: skip
        for path, value in keys.items():
            dom0.store.write(path, value, tx)

    dom0.store.transaction(write)
    return domain


def destroy(dom0: SimPlatform, domid: int) -> None:
    """End a domain at once, and take its directories away. Raises PlatformError if there is none."""
    uuid = dom0.domain_uuid(domid)
    dom0.hypercalls.call(wire.DESTROY_DOMAIN, domid)
    clean(dom0.store, domid, uuid)


def clean(store: XenStore, domid: int, uuid: str = "") -> None:
    """Remove what a domain that is gone has left in the store."""
    for backend in store.ls("/local/domain/0/backend") or []:
        store.rm(f"/local/domain/0/backend/{backend}/{domid}")
    for path in (f"/local/domain/{domid}", f"/libxl/{domid}", f"/vm/{uuid}" if uuid else ""):
        if path:
            store.rm(path)


def list_domains(xen: Hypercalls) -> list[DomainState]:
    """All domains, with those that are dying because somebody still has a page of theirs mapped."""
    found: list[DomainState] = []
    first = 0
    while True:
        reply = xen.call(wire.LIST_DOMAINS, first)
        for i in range(reply.values[0]):
            domid, flags, pages, handles, uuid = wire.DOMAIN_RECORD.unpack_from(reply.tail, i * wire.DOMAIN_RECORD.size)
            found.append(DomainState(domid, bool(flags & wire.DOMAIN_DYING), pages, handles, uuid.decode("ascii")))
        if not reply.values[0]:
            return found
        first = found[-1].domid + 1
