"""What xl and libxl do: make and end domains, attach and detach devices, on the embedded Xen.

The store's directories, their permissions and the order of writing are those of libxl (libxl_create.c,
libxl_device.c, libxl_disk.c of Xen 4.17/4.20): a frontend directory belongs to the guest and is readable to the
backend, a backend directory the other way round; everything is written in one transaction, states last.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.platform import XenStore

from . import wire
from .hypercall import Hypercalls

if TYPE_CHECKING:
    from .joined import SimPlatform

Value = str | int | bytes

XENBUS_INITIALISING, XENBUS_CLOSING, XENBUS_CLOSED = 1, 5, 6  # io/xenbus.h


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


def devid_of(vdev: str) -> int:
    """The number of a virtual device name: xvda, xvdb3, sda, hdc (xen-vbd-interface.7). Raises ConfigError."""
    found = re.fullmatch(r"(xvd|sd|hd)([a-z]{1,2})(\d{0,3})", vdev)
    if not found:
        raise ConfigError(f"virtual device {vdev!r}: expected a name such as xvda, xvdb1, sda or hda")
    disk = 0
    for letter in found[2]:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    disk -= 1
    part = int(found[3] or 0)
    if found[1] == "xvd":
        return 202 << 8 | disk << 4 | part if disk < 16 and part < 16 else 1 << 28 | disk << 8 | part
    if found[1] == "sd" and disk < 16 and part < 16:
        return 8 << 8 | disk << 4 | part
    if found[1] == "hd" and disk < 4 and part < 64:
        return (3 if disk < 2 else 22) << 8 | (disk & 1) << 6 | part
    raise ConfigError(f"virtual device {vdev!r}: there are sda to sdp with 15 partitions and hda to hdd with 63")


def device_paths(kind: str, domid: int, devid: int, backend_domid: int = 0) -> tuple[str, str]:
    """(backend directory, frontend directory) of a device."""
    return (
        f"/local/domain/{backend_domid}/backend/{kind}/{domid}/{devid}",
        f"/local/domain/{domid}/device/{kind}/{devid}",
    )


def attach(store: XenStore, kind: str, domid: int, devid: int, *, backend_domid: int = 0,
           be: Mapping[str, Value] | None = None, fe: Mapping[str, Value] | None = None) -> str:  # fmt: skip
    """Make the two directories of a device with the keys that all have, and `be` and `fe`. Returns the backend's."""
    backend, frontend = device_paths(kind, domid, devid, backend_domid)
    ours: dict[str, Value] = {"frontend": frontend, "frontend-id": domid, "online": 1, **(be or {})}
    theirs: dict[str, Value] = {"backend": backend, "backend-id": backend_domid, **(fe or {})}

    def write(tx: int) -> None:
        if store.read(f"{backend}/state", tx) is not None:
            raise PlatformError(f"{kind} {devid} of domain {domid}: attached already; detach it first")
        for path, perms, keys in (
            (frontend, [f"n{domid}", f"r{backend_domid}"], theirs),
            (backend, [f"n{backend_domid}", f"r{domid}"], ours),
        ):
            store.rm(path, tx)
            store.mkdir(path, tx)
            store.set_perms(path, perms, tx)
            for key, value in keys.items():
                store.write(f"{path}/{key}", value, tx)
        store.write(f"{frontend}/state", XENBUS_INITIALISING, tx)
        store.write(f"{backend}/state", XENBUS_INITIALISING, tx)

    store.transaction(write)
    return backend


def attach_vbd(store: XenStore, domid: int, vdev: int | str, params: str, *, mode: str = "w", backend_domid: int = 0,
               device_type: str = "disk", be: Mapping[str, Value] | None = None,
               fe: Mapping[str, Value] | None = None) -> str:  # fmt: skip
    """Attach a disk: `params` is its URI, `mode` "r", "w" or "w!". Returns the backend directory.

    libxl_disk.c, device_disk_add. `be` and `fe` add keys or replace them.
    """
    devid = devid_of(vdev) if isinstance(vdev, str) else vdev
    ours: dict[str, Value] = {
        "params": params, "type": "phy", "dev": vdev if isinstance(vdev, str) else f"{devid}",
        "removable": 1 if device_type == "cdrom" else 0, "bootable": 1, "mode": mode, "device-type": device_type,
        "discard-enable": 1, "specification": "xen", **(be or {}),
    }  # fmt: skip
    theirs: dict[str, Value] = {
        "virtual-device": devid, "device-type": device_type, "trusted": 1, **(fe or {}),
    }  # fmt: skip
    return attach(store, "vbd", domid, devid, backend_domid=backend_domid, be=ours, fe=theirs)


def detach(store: XenStore, backend: str, *, timeout: float = 10.0, force: bool = False) -> bool:
    """Ask a backend to let a device go: online 0, state 5; then remove both directories.

    Waits `timeout` seconds for state 6, as libxl does. Returns whether it came; without it the directories stay
    unless `force`.
    """

    def ask(tx: int) -> None:
        store.write(f"{backend}/online", 0, tx)
        if int(store.read(f"{backend}/state", tx) or 0) not in (0, XENBUS_CLOSED):
            store.write(f"{backend}/state", XENBUS_CLOSING, tx)

    frontend = (store.read(f"{backend}/frontend") or b"").decode()
    store.transaction(ask)
    deadline = time.monotonic() + timeout
    while (state := int(store.read(f"{backend}/state") or XENBUS_CLOSED)) != XENBUS_CLOSED:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    done = state == XENBUS_CLOSED
    if done or force:
        for path in _and_empty_parents(store, backend):
            store.rm(path)
        if frontend.startswith("/local/domain/"):
            store.rm(frontend)
    return done


def _and_empty_parents(store: XenStore, backend: str) -> Sequence[str]:
    """The directory, and the one of its domain if nothing else is in it."""
    parent, _, name = backend.rpartition("/")
    return [backend, parent] if store.ls(parent) in ([name], []) else [backend]
