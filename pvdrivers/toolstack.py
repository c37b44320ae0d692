"""What xl and libxl do with a device, on the embedded Xen and on the real one: attach, wait, find, detach.

The directories, their permissions and the order of writing are those of libxl (libxl_device.c, libxl_disk.c of Xen
4.17/4.20): a frontend directory belongs to the guest and is readable to the backend, a backend directory the other way
round; everything is written in one transaction, states last. Whoever calls this is dom0.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rings.vdev import vdev_number

from .errors import ConfigError, PlatformError
from .platform import XenStore
from .xenbus import BadState, XenbusState, parse_state

Value: TypeAlias = str | int | bytes

FRONTEND_KINDS = {"pvblk": "vbd", "qdisk": "vbd", "pvnet": "vif"}
"""Kind of backend -> kind of its frontend, where they differ."""
DISK_KINDS = ("pvblk", "vbd", "qdisk")
"""Kinds of backend that serve a disk."""
VIF_KINDS = ("pvnet", "vif")
"""... and those that serve a network interface."""
_FIRST_RESERVED = 0x7FF0  # DOMID_FIRST_RESERVED
_LOOK_S = 0.01
_SECOND_TRY_S = 2.0
"""How long a backend that has told of an error may still come round: an image may be let go a moment later."""


def devid_of(vdev: str) -> int:
    """The number of a virtual device: xvda, xvdb3, sda, hdc, d1p2, 51712 (xen-vbd-interface.7). Raises ConfigError."""
    try:
        return vdev_number(vdev)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def device_paths(kind: str, domid: int, devid: int, backend_domid: int = 0) -> tuple[str, str]:
    """(backend directory, frontend directory) of a device; `kind` is that of the backend."""
    return (
        f"/local/domain/{backend_domid}/backend/{kind}/{domid}/{devid}",
        f"/local/domain/{domid}/device/{FRONTEND_KINDS.get(kind, kind)}/{devid}",
    )


def find_domain(store: XenStore, text: str, *, left: bool = False) -> int:
    """The id of a domain given by id or name, as xl has it. Raises ConfigError if there is none.

    With `left` an id will do of which only disks are left: libxl knows nothing of those that it has not attached, and
    leaves them when it destroys the domain.
    """
    if text.isascii() and text.isdigit() and int(text) < _FIRST_RESERVED:
        if left and disks(store, int(text)):
            return int(text)
        if store.read(f"/local/domain/{int(text)}/name") is None and store.ls(f"/local/domain/{int(text)}") is None:
            raise ConfigError(f"domain {text}: there is none; `xl list` shows them")
        return int(text)
    names = []
    for domid in store.ls("/local/domain") or ():
        name = (store.read(f"/local/domain/{domid}/name") or b"").decode(errors="replace")
        if name == text and domid.isdigit():
            return int(domid)
        names.append(name)
    known = ", ".join(sorted(filter(None, names))) or "none with a name"
    raise ConfigError(f"domain {text!r}: there is none of that name; there are: {known}")


def attach(store: XenStore, kind: str, domid: int, devid: int, *, backend_domid: int = 0,
           be: Mapping[str, Value] | None = None, fe: Mapping[str, Value] | None = None) -> str:  # fmt: skip
    """Make the two directories of a device with the keys that all have, and `be` and `fe`. Returns the backend's.

    Raises PlatformError if the device is there, served by whatever kind of backend.
    """
    backend, frontend = device_paths(kind, domid, devid, backend_domid)
    ours: dict[str, Value] = {"frontend": frontend, "frontend-id": domid, "online": 1, **(be or {})}
    theirs: dict[str, Value] = {"backend": backend, "backend-id": backend_domid, **(fe or {})}

    def write(tx: int) -> None:
        # What the guest says of its backend only ever keeps it from having two.
        said = (store.read(f"{frontend}/backend", tx) or b"").decode("latin-1").rstrip("\0/")
        other = re.fullmatch(rf"/local/domain/[0-9]+/backend/[a-z0-9]+/{domid}/{devid}", said)
        for path in {backend, said} if other else {backend}:
            if store.read(f"{path}/state", tx) is not None:
                raise PlatformError(f"{kind} {devid} of domain {domid}: attached already ({path}); detach it first")
        for path, perms, keys in (
            (frontend, [f"n{domid}", f"r{backend_domid}"], theirs),
            (backend, [f"n{backend_domid}", f"r{domid}"], ours),
        ):
            store.rm(path, tx)
            store.mkdir(path, tx)
            store.set_perms(path, perms, tx)
            for key, value in keys.items():
                store.write(f"{path}/{key}", value, tx)
        store.write(f"{frontend}/state", int(XenbusState.Initialising), tx)
        store.write(f"{backend}/state", int(XenbusState.Initialising), tx)

    store.transaction(write)
    return backend


def attach_vbd(store: XenStore, domid: int, vdev: int | str, params: str, *, mode: str = "w", backend_domid: int = 0,
               device_type: str = "disk", kind: str = "vbd", be: Mapping[str, Value] | None = None,
               fe: Mapping[str, Value] | None = None) -> str:  # fmt: skip
    """Attach a disk: `params` is its URI, `mode` "r", "w" or "w!". Returns the backend directory.

    libxl_disk.c, device_disk_add. `kind` is that of the backend; `be` and `fe` add keys or replace them.
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
    return attach(store, kind, domid, devid, backend_domid=backend_domid, be=ours, fe=theirs)


def backend_state(store: XenStore, backend: str) -> XenbusState:
    """The state of a backend, Unknown if there is none (or nonsense)."""
    state = parse_state(store.read(f"{backend}/state"))
    return XenbusState.Unknown if isinstance(state, BadState) else state


def wait_for(store: XenStore, backend: str, states: Sequence[XenbusState], timeout: float) -> XenbusState:
    """Wait for one of these states, but hardly for a backend that says why it will not come; the last state."""
    deadline = time.monotonic() + timeout
    patient = True
    while (state := backend_state(store, backend)) not in states and time.monotonic() < deadline:
        if patient and store.read(f"{backend}/hotplug-status") == b"error":
            patient = False
            deadline = min(deadline, time.monotonic() + _SECOND_TRY_S)
        time.sleep(_LOOK_S)
    return state


def what_it_said(store: XenStore, backend: str) -> str:
    """Why a backend has trouble: its hotplug-error, or what stands where Linux puts errors; "" if nothing."""
    raw = store.read(f"{backend}/hotplug-error")
    if not raw:
        home, _, node = backend.partition("/backend/")
        # "22 text"
        raw = (store.read(f"{home}/error/backend/{node}/error") or b"").lstrip(b"-0123456789").lstrip()
    return printable(raw)


def detach(store: XenStore, backend: str, *, timeout: float = 10.0, force: bool = False, at_once: bool = False) -> bool:
    """Ask a backend to let a device go: online 0, state 5; then remove both directories.

    Waits `timeout` seconds for state 6, as libxl does. Returns whether it came; without it the directories stay
    unless `force`. With `at_once` the guest is not asked: its directory goes first (xl block-detach --force).
    """
    frontend = (store.read(f"{backend}/frontend") or b"").decode("latin-1").rstrip("\0/")
    guest = backend.split("/")[-2] if backend.count("/") >= 2 else ""
    ours = frontend.startswith(f"/local/domain/{guest}/")  # whatever stands there, nobody else's is removed

    def ask(tx: int) -> None:
        if at_once and ours:
            store.rm(frontend, tx)
        if store.read(f"{backend}/state", tx) is None:
            return
        store.write(f"{backend}/online", 0, tx)
        if backend_state(store, backend) not in (XenbusState.Unknown, XenbusState.Closed):
            store.write(f"{backend}/state", int(XenbusState.Closing), tx)

    store.transaction(ask)
    ended = (XenbusState.Closed, XenbusState.Unknown)
    deadline = time.monotonic() + timeout
    while not (done := backend_state(store, backend) in ended) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    if done or force:
        for path in _and_empty_parents(store, backend):
            store.rm(path)
        if ours:
            store.rm(frontend)
    return done


def _and_empty_parents(store: XenStore, backend: str) -> Sequence[str]:
    """The directory, and the one of its domain if nothing else is in it."""
    parent, _, name = backend.rpartition("/")
    return [backend, parent] if store.ls(parent) in ([name], []) else [backend]


@dataclass(frozen=True)
class Attached:
    """A device as it stands in the store. What the guest wrote is shown, and never followed."""

    backend: str
    backend_domid: int
    kind: str
    devid: int
    name: str
    """What its user calls it."""
    state: XenbusState
    """The backend's."""
    front_state: str
    queues: int
    made_by_xl: bool


@dataclass(frozen=True)
class Disk(Attached):
    """... a disk. `target` is `params` of the backend."""

    mode: str
    target: str
    event_channel: str
    ring_ref: str


@dataclass(frozen=True)
class Vif(Attached):
    """... a network interface. `port` is `bridge` of the backend, "" if there is none."""

    mac: str
    port: str
    event_channel: str
    tx_ring_ref: str
    rx_ring_ref: str


def disks(store: XenStore, domid: int) -> list[Disk]:
    """All disks of a domain, by their backends' directories, in every domain that has some."""
    return [_disk(store, *where) for where in _directories(store, DISK_KINDS, domid)]


def vifs(store: XenStore, domid: int) -> list[Vif]:
    """All vifs of a domain, as disks()."""
    return [_vif(store, *where) for where in _directories(store, VIF_KINDS, domid)]


def all_macs(store: XenStore, home: int) -> Iterator[tuple[str, str]]:
    """(address, backend directory) of each vif that domain `home` serves and that is not closed."""
    for kind in VIF_KINDS:
        top = f"/local/domain/{home}/backend/{kind}"
        for guest in store.ls(top) or ():
            for devid in store.ls(f"{top}/{guest}") or ():
                backend = f"{top}/{guest}/{devid}"
                if backend_state(store, backend) not in (XenbusState.Unknown, XenbusState.Closed):
                    yield printable(store.read(f"{backend}/mac")).lower(), backend


def free_devid(store: XenStore, domid: int) -> int:
    """The lowest number that no vif of a domain has, whoever has attached it."""
    used = {name for top in (f"/local/domain/{domid}/device/vif", f"/libxl/{domid}/device/vif")
            for name in store.ls(top) or ()}  # fmt: skip
    used |= {str(vif.devid) for vif in vifs(store, domid)}
    return next(n for n in range(len(used) + 1) if str(n) not in used)


_Where: TypeAlias = tuple[str, int, int, int]


def _directories(store: XenStore, kinds: Sequence[str], domid: int) -> list[_Where]:
    """(kind, domid, devid, home) of each device of these kinds that a domain has, in the order of devid."""
    found = []
    for home in sorted(filter(str.isdigit, store.ls("/local/domain") or ()), key=int):
        for kind in kinds:
            top = f"/local/domain/{home}/backend/{kind}/{domid}"
            for devid in filter(str.isdigit, store.ls(top) or ()):
                if store.read(f"{top}/{devid}/state") is not None:
                    found.append((kind, domid, int(devid), int(home)))
    return sorted(found, key=lambda where: where[2])


def _common(store: XenStore, where: _Where) -> dict[str, Any]:
    """What stands in the store of a device of any class: the fields of Attached but its name."""
    kind, domid, devid, home = where
    backend, frontend = device_paths(kind, domid, devid, home)
    queues = printable(store.read(f"{frontend}/multi-queue-num-queues"))
    libxl = f"/libxl/{domid}/device/{FRONTEND_KINDS.get(kind, kind)}/{devid}/backend"
    return {
        "backend": backend, "backend_domid": home, "kind": kind, "devid": devid,
        "state": backend_state(store, backend), "front_state": printable(store.read(f"{frontend}/state")),
        "queues": int(queues) if queues.isascii() and queues.isdigit() and len(queues) < 5 else 1,
        "made_by_xl": store.read(libxl) == backend.encode(),
    }  # fmt: skip


def _first_of(store: XenStore, where: _Where, *names: str) -> str:
    """The first of these keys that the frontend has written, flat or of its queue 0; "" if none."""
    frontend = device_paths(*where)[1]
    paths = (f"{frontend}{queue}/{name}" for queue in ("", "/queue-0") for name in names)
    return next(filter(None, (printable(store.read(path)) for path in paths)), "")


def _disk(store: XenStore, *where: Any) -> Disk:
    known = _common(store, where)
    name, mode, target = (printable(store.read(f"{known['backend']}/{key}")) for key in ("dev", "mode", "params"))
    return Disk(
        **known, name=name or str(known["devid"]), mode=mode, target=target,
        event_channel=_first_of(store, where, "event-channel"),
        ring_ref=_first_of(store, where, "ring-ref", "ring-ref0"),
    )  # fmt: skip


def _vif(store: XenStore, *where: Any) -> Vif:
    known = _common(store, where)
    mac, port = (printable(store.read(f"{known['backend']}/{key}")) for key in ("mac", "bridge"))
    return Vif(
        **known, name=str(known["devid"]), mac=mac.lower(), port=port,
        event_channel=_first_of(store, where, "event-channel", "event-channel-tx"),
        tx_ring_ref=_first_of(store, where, "tx-ring-ref"),
        rx_ring_ref=_first_of(store, where, "rx-ring-ref"),
    )  # fmt: skip


def printable(raw: bytes | None, most: int = 1024) -> str:
    """A value as it can be printed on a terminal, whoever wrote it."""
    text = (raw or b"")[:most].rstrip(b"\0").decode(errors="replace")
    return "".join(_printable(text))


def _printable(text: str) -> Iterator[str]:
    for letter in text:
        yield letter if letter.isprintable() else "?"
