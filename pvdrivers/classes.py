"""The table of device classes: the core's only knowledge of blkback and its like.

A class is a subclass of pvdrivers.device.Device, named "module:Class". Other packages add theirs with an
entry point of the group "pvdrivers.device_classes". Its module may have a function warm(), which compiles
everything that serving the class will ever need.

On a real Xen others serve backends, too. `vbd` is the kernel's own kind: where its driver is there, the kernel is left
alone with it. `pvblk` is a kind of ours, which neither the kernel nor libxl knows: `pvdrivers block-attach` makes such
devices, beside whatever serves the others. `qdisk` is QEMU's, which libxl starts for it, so it is served only if asked
for by name, and then only where no QEMU is to be found. In the same way `vif` is the kernel's kind of network
interface, and `pvnet` is ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from . import modprobe
from .device import Device
from .errors import ConfigError
from .platform import XenStore

GROUP = "pvdrivers.device_classes"

DEVICE_CLASSES: dict[str, str] = {
    "vbd": "blkback.backend:BlkBackend",
    "pvblk": "blkback.backend:BlkBackend",
    "qdisk": "blkback.backend:BlkBackend",
    "vif": "netback.backend:VifBackend",
    "pvnet": "netback.backend:VifBackend",
}
"""Name of the directory below backend/ -> where its class is."""

ONLY_BY_NAME = frozenset({"qdisk", "vif", "pvnet"})
"""Not among the classes that are served when none is named: who asked for disks has networks from others."""


def known() -> dict[str, str]:
    """The table, with what installed packages add to it. Ours cannot be replaced from outside."""
    added = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    return {**added, **DEVICE_CLASSES}


def load(name: str) -> type[Device]:
    """The class `name`. Raises ConfigError if there is none, or its module does not import."""
    table = known()
    if name not in table:
        raise ConfigError(f"device class {name!r}: there are {', '.join(sorted(table))}")
    module, _, attribute = table[name].partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"device class {name!r} ({table[name]}) cannot be loaded: {e}") from e
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise ConfigError(f"device class {name!r}: {table[name]} is not a pvdrivers.device.Device")
    return found


def load_all(names: Iterable[str] | None = None) -> dict[str, type[Device]]:
    """The classes asked for, by default all but those that have to be asked for."""
    return {name: load(name) for name in (sorted(known().keys() - ONLY_BY_NAME) if names is None else names)}


def check_options(table: Mapping[str, type[Device]], options: Mapping[str, Any]) -> None:
    """Have the classes look at the options of `serve` (Context.options), before anything is served: those that have a
    class method of this name. Raises ConfigError."""
    for found in table.values():
        check = getattr(found, "check_options", None)
        if check is not None:
            check(options)


def in_qemu(store: XenStore, home: int, name: str, domid: int, devid: int) -> str:
    """Why a device is QEMU's, "" if it is not: libxl has started one for the domain, or it does so for this disk.

    libxl_dm.c: device-model/<domid>/state below the home of the domain that QEMU runs in, which is `home`; a domain of
    xl's that has a qdisk gets one, after its disks' directories have been written (libxl__need_xenpv_qemu).
    """
    if name != "qdisk":
        return ""
    try:
        if store.read(f"/local/domain/{home}/device-model/{domid}/state") is not None:
            return f"domain {domid} has a QEMU, which serves it"
        if store.read(f"/libxl/{domid}/device/vbd/{devid}/backend") is not None:
            return "xl has made it, and starts a QEMU for it"
    except PermissionError:  # a driver domain may not look; who serves disks there is its operator's choice
        pass
    return ""


def beside_kernel(names: Iterable[str] | None, root: Path = Path("/")) -> tuple[list[str], list[str]]:
    """What to serve on a real Xen, and what to tell the operator of it.

    A class named for which the kernel has a driver, or will have one, is a ConfigError: two backends on one device
    destroy the disk.
    """
    served, notes = [], []
    for name in sorted(known().keys() - ONLY_BY_NAME) if names is None else names:
        loaded = modprobe.in_kernel(name, root)
        driver = loaded or modprobe.comes_with_udev(name, root)
        if not driver:
            served.append(name)
            continue
        module = modprobe.MODULES.get(name, name)
        remedy = (
            f"{f'unload it (rmmod {module}, with no guest on it) and ' if loaded else ''}keep it from loading (copy"
            " examples/dom0/modprobe-pvdrivers.conf to /etc/modprobe.d, see docs/dom0.md), or attach disks beside it"
            " with `pvdrivers block-attach`"
        )
        if names is not None:
            raise ConfigError(f"device class {name}: {driver} serves it; {remedy}")
        notes.append(f"{name} is left to {driver.rstrip(',')}; to have it served here, {remedy}")
    return served, notes


def warm(names: Iterable[str] | None = None) -> None:
    """Import and compile all that the classes need, so that no guest ever waits for a compiler."""
    modules = {found.__module__ for found in load_all(names).values()}
    for module in ("pvdrivers.worker.control", *sorted(modules)):
        compile_all = getattr(importlib.import_module(module), "warm", None)
        if compile_all is not None:
            compile_all()
