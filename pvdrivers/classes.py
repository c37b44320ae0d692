"""The table of device classes: the core's only knowledge of blkback and its like.

A class is a subclass of pvdrivers.device.Device, named "module:Class". Other packages add theirs with an
entry point of the group "pvdrivers.device_classes". Its module may have a function warm(), which compiles
everything that serving the class will ever need.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib import metadata

from .device import Device
from .errors import ConfigError

GROUP = "pvdrivers.device_classes"

DEVICE_CLASSES: dict[str, str] = {
    "vbd": "blkback.backend:BlkBackend",
}
"""Name of the directory below backend/ -> where its class is."""


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
    """The classes asked for, all of them by default."""
    return {name: load(name) for name in (known() if names is None else names)}


def warm(names: Iterable[str] | None = None) -> None:
    """Import and compile all that the classes need, so that no guest ever waits for a compiler."""
    modules = {found.__module__ for found in load_all(names).values()}
    for module in ("pvdrivers.worker.control", *sorted(modules)):
        compile_all = getattr(importlib.import_module(module), "warm", None)
        if compile_all is not None:
            compile_all()
