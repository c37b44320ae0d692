"""A disk as xl writes it (xl-disk-configuration(5)), with the options of storage.uri beside xl's own.

    /dev/vg/guest,raw,xvdb,rw        target=/srv/disk.img vdev=xvdb access=ro        memory:64M,,xvdb,w,policy=copy

Positional parameters are target, format, vdev, access. What differs from xl: the target may be a URI of storage.uri,
and one that begins with ./ or ../ is a path from the current directory, where xl has /dev.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import quote

from pvdrivers.errors import ConfigError
from rings.vdev import vdev_number

from .uri import OPTIONS, DiskSpec, parse_disk

__all__ = ["XlDisk", "parse_xl_disk"]

_POSITIONS: Final = ("target", "format", "vdev", "access")
_ACCESS: Final = {"r": "r", "ro": "r", "w": "w", "rw": "w", "w!": "w!"}
_FLAGS: Final = {
    "cdrom": ("devtype", "cdrom"),
    "discard": ("discard", "on"),
    "no-discard": ("discard", "off"),
    "trusted": ("trusted", "on"),
    "untrusted": ("trusted", "off"),
    "removable": ("removable", "on"),
    "direct-io-safe": ("direct-io-safe", "on"),
}
_KEYS: Final = {"devtype", "backend", "backendtype", "specification", "trusted", "direct-io-safe", "script"}
_OURS: Final = set(OPTIONS) - {"mode", "cdrom", "vdev"}
_PREFIX: Final = re.compile(r"(raw|aio|file|phy|ioemu|tap|tap2|tapdisk):(?=.*/)")
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*:")


@dataclass(frozen=True)
class XlDisk:
    """A disk to be attached."""

    spec: DiskSpec
    devid: int
    vdev: str
    backend: str = "0"
    """Name or id of the domain that serves it."""
    direct_io_safe: bool = False
    trusted: bool = True


def parse_xl_disk(words: Sequence[str]) -> XlDisk:
    """Read the components of a disk specification, in order. Raises ConfigError with what is wrong and allowed."""
    text = " ".join(words)
    try:
        return _disk(_Words().read(words).values, text)
    except ValueError as e:
        raise ConfigError(f"disk {text!r}: {e}") from None


class _Words:
    """What was given, by name."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._filled: set[str] = set()  # positions that were passed over with an empty value, too

    def read(self, words: Sequence[str]) -> _Words:
        for word in words:
            rest = word
            while rest.strip():
                rest = rest.lstrip()
                if rest.startswith("target="):  # eats all that follows, as in xl
                    self._set("target", rest.removeprefix("target="))
                    break
                item, _, rest = rest.partition(",")
                self._item(item)
        return self

    def _item(self, item: str) -> None:
        name, equals, value = item.partition("=")
        if item in _FLAGS:
            self._set(*_FLAGS[item])
        elif equals and not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise ValueError(f"{item!r}: a target with = in it is written target=..., last")
        elif equals:
            if name not in _KEYS | _OURS | set(_POSITIONS):
                known = ", ".join(sorted([*_POSITIONS, *_KEYS, *_FLAGS, *_OURS]))
                raise ValueError(f"unknown parameter {name!r}; there are: {known}")
            self._set(name, value)
        else:
            self._position(item)

    def _position(self, item: str) -> None:
        free = [name for name in _POSITIONS if name not in self._filled and name not in self.values]
        if not free:
            raise ValueError(f"{item!r} is one too many: the positions are {', '.join(_POSITIONS)}")
        name = free[0]
        self._filled.add(name)
        if name == "target" and item and (match := _PREFIX.match(item)) and not item.startswith("file://"):
            # The old syntax: prefixes, and no format after the target.
            while match:
                item = item[match.end() :]
                match = _PREFIX.match(item)
            self._filled.add("format")
        if name == "vdev" and item.endswith(":cdrom"):
            item = item.removesuffix(":cdrom")
            self._set("devtype", "cdrom")
        if item:
            self._set(name, item)

    def _set(self, name: str, value: str) -> None:
        if self.values.get(name, value) != value:
            raise ValueError(f"{name} is given twice; keep one")
        if value:
            self.values[name] = value


def _disk(values: dict[str, str], text: str) -> XlDisk:
    switch: Callable[[str], bool] = OPTIONS["removable"].read
    cdrom = _one_of(values, "devtype", "disk", ("disk", "cdrom")) == "cdrom"
    _one_of(values, "specification", "xen", ("xen",))
    image = values.get("format", "raw")
    if image != "raw":
        raise ValueError(
            f"format={image}: only raw disks are served; qemu-img convert -O raw makes one, or leave it to QEMU (qdisk)"
        )
    if "script" in values:
        raise ValueError("script: none is run here; name the block device that it would make")
    if values.get("backendtype", "phy") != "phy":
        raise ValueError(f"backendtype={values['backendtype']}: it is served by pvdrivers; leave that out")
    access = values.get("access", "r" if cdrom else "rw")
    if access not in _ACCESS:
        raise ValueError(f"access={access}: must be one of {', '.join(_ACCESS)}")
    vdev = values.get("vdev", "")
    if not vdev:
        raise ValueError("vdev is missing: what the guest is to call it, such as vdev=xvdb")
    devid = vdev_number(vdev)
    options = [f"{name}={values[name]}" for name in values if name in _OURS]
    options.append(f"mode={_ACCESS[access]}")
    if cdrom:
        options.append("cdrom=on")
    backend = values.get("backend", "0")
    spec = parse_disk(",".join([_target(values.get("target", "")), *options]))
    try:
        trusted, safe = (switch(values.get(name, default)) for name, default in (("trusted", "on"),
                         ("direct-io-safe", "off")))  # fmt: skip
    except ValueError:
        raise ValueError("trusted and direct-io-safe are on or off") from None
    return XlDisk(replace(spec, vdev=""), devid, vdev, backend, safe, trusted)


def _one_of(values: dict[str, str], name: str, default: str, allowed: Sequence[str]) -> str:
    value = values.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name}={value}: must be {' or '.join(allowed)}")
    return value


def _target(text: str) -> str:
    """The target as storage.uri reads it."""
    if text == "":
        raise ValueError("target is missing: a path, file:///path, memory:SIZE or null:SIZE")
    if _SCHEME.match(text):
        return text
    if not text.startswith("/"):
        text = os.path.abspath(text) if text.startswith(("./", "../")) else "/dev/" + text
    return "file://" + quote(text) if "," in text else text
