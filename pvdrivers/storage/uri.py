"""What the operator wrote about a disk, read once: a URI, then options, separated by commas.

    /srv/disk.img,mode=r          file:///srv/disk.img,direct=no        /dev/vg/guest,sector_size=4096
    memory:64M                    null:1T,queues=8                      (also xl's aio:/path, raw:/path,
    phy:/dev/sdb)

A comma in a path is written %2C in a file:// URI. Each mistake is a ConfigError that names the option, the
value and what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final
from urllib.parse import quote, unquote

from pvdrivers.errors import ConfigError

__all__ = ["OPTIONS", "SCHEMES", "DiskSpec", "Option", "parse_disk", "parse_size", "parse_xl", "size_text"]

SECTOR: Final = 512
MAX_SIZE: Final = 1 << 61
"""Bytes in the largest disk: byte offsets, and the fence of storage.locks at 2**62, stay positive in 63 bits."""

_SIZE = re.compile(r"([0-9]{1,20})([KMGT]?)(i?B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_DEFAULT_SIZE = {"null": 1 << 30, "memory": 64 << 20}
_XL_MODES = {"r": "r", "ro": "r", "w": "w", "rw": "w", "w!": "w!"}
_IMAGES = ("qcow", "qcow2", "vhd", "qed")
_XL_PREFIX = re.compile(r"(?:tap:|tap2:)?(aio|raw|phy|file):(?!//)")


@dataclass(frozen=True)
class DiskSpec:
    """One disk as asked for. `path` is absolute for files and block devices, `size` in bytes is for the others."""

    uri: str
    scheme: str = "file"
    path: str = ""
    size: int = 0
    mode: str = "w"
    sector_size: int = 0
    direct: str = "auto"
    cache: str = "writeback"
    removable: bool = False
    cdrom: bool = False
    discard: bool = True
    secure_discard: bool = False
    policy: str = "persistent"
    persistent: bool = True
    queues: int = 4
    ring_order: int = 4
    indirect: int = 256
    grant_pages: int = 0
    compat_4k: bool = False
    vdev: str = ""
    direct_io_safe: bool = False
    """A key of the toolstack's, and no option: see storage.file_store, _OVER_NETWORK."""

    @property
    def readonly(self) -> bool:
        return self.mode == "r"

    @property
    def shared(self) -> bool:
        """May others use it too? Readers together, writers by w! only."""
        return self.mode != "w"

    def text(self) -> str:
        """The same disk, as `parse_disk` reads it: canonical URI, then the options that are not the default."""
        if self.scheme == "file":
            plain = "," not in self.path and not _scheme_of(self.path)
            uri = self.path if plain else "file://" + quote(self.path)
        else:
            uri = f"{self.scheme}:{size_text(self.size)}"
        default = DiskSpec(uri, mode="r" if self.cdrom else "w", persistent=self.policy == "persistent")
        parts = [uri]
        for name in OPTIONS:
            value = getattr(self, name)
            if value != getattr(default, name):
                parts.append(f"{name}={_on_off(value)}")
        return ",".join(parts)


def _on_off(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def parse_size(text: str) -> int:
    """Bytes: digits with an optional K, M, G or T (powers of 1024). Raises ValueError."""
    m = _SIZE.fullmatch(text.strip())
    if m is None or (m[3] and not m[2] and m[3] != "B"):
        raise ValueError(f"{text!r} is not a size; write bytes, or a number with K, M, G or T, like 64M")
    size = int(m[1]) << _UNITS[m[2].upper()]
    if size > MAX_SIZE:
        raise ValueError(f"{text!r} is more than the largest disk, {size_text(MAX_SIZE)}")
    return size


def size_text(size: int) -> str:
    """A size as people write it, and exactly: 64M, 1536K, 512."""
    for unit in "TGMK":
        if size and size % (1 << _UNITS[unit]) == 0:
            return f"{size >> _UNITS[unit]}{unit}"
    return str(size)


@dataclass(frozen=True)
class Option:
    """One key=value: how it is read, what is allowed, and what it is for."""

    read: Callable[[str], Any]
    allowed: str
    help: str


def _choice(*words: str) -> tuple[Callable[[str], str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return read, ", ".join(words[:-1]) + " or " + words[-1]


def _switch() -> tuple[Callable[[str], bool], str]:
    table = {
        "on": True,
        "yes": True,
        "true": True,
        "1": True,
        "off": False,
        "no": False,
        "false": False,
        "0": False,
    }

    def read(text: str) -> bool:
        if text.lower() not in table:
            raise ValueError
        return table[text.lower()]

    return read, "on or off"


def _number(low: int, high: int) -> tuple[Callable[[str], int], str]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return read, f"a number from {low} to {high}"


def _sector_size(text: str) -> int:
    return {"512": 512, "4096": 4096, "4K": 4096, "4k": 4096, "auto": 0, "0": 0}[text]


def _vdev(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]{1,32}", text):
        raise ValueError
    return text


OPTIONS: Final[dict[str, Option]] = {
    "mode": Option(*_choice("r", "w", "w!"), "read only; writable and ours alone; writable though others use it too"),
    "sector_size": Option(_sector_size, "512, 4096 or auto", "what the guest sees; auto: the device's own, files 512"),
    "direct": Option(
        *_choice("yes", "no", "auto"),
        "past the page cache (O_DIRECT); auto: where it is possible, on NFS and its like only with direct-io-safe",
    ),
    "cache": Option(
        *_choice("writeback", "writethrough", "unsafe"),
        "the guest flushes; every write is durable; flushes are answered and not done",
    ),
    "removable": Option(*_switch(), "say so to the guest"),
    "cdrom": Option(*_switch(), "a CD-ROM: read only"),
    "discard": Option(*_switch(), "offer discard where the store can"),
    "secure_discard": Option(
        *_switch(), "offer secure discard: zeros are written first; you vouch that this erases what lies below"
    ),
    "policy": Option(
        *_choice("map", "persistent", "copy"), "guest pages: mapped for each request, kept mapped, or copied"
    ),
    "persistent": Option(*_switch(), "offer persistent grants; on only with policy=persistent"),
    "queues": Option(*_number(1, 64), "at most so many rings"),
    "ring_order": Option(*_number(0, 4), "at most 2**n pages a ring"),
    "indirect": Option(*_number(0, 4096), "at most so many segments in an indirect request; 0: none offered"),
    "grant_pages": Option(
        *_number(0, 999_999_999), "at most so many pages of the guest mapped, the rest is copied; 0: see serve"
    ),
    "compat_4k": Option(
        *_switch(),
        "sectors and ranges in units of sector_size, as QEMU and Windows have it, not of 512 bytes",
    ),
    "vdev": Option(_vdev, "a name like xvda", "what the guest is to call it"),
}
assert set(OPTIONS) <= {f.name for f in fields(DiskSpec)}

SCHEMES: Final = ("file", "memory", "null")


def _scheme_of(uri: str) -> str:
    m = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", uri)
    return m[1].lower() if m else ""


def _target(uri: str) -> dict[str, Any]:
    """scheme, path and size of a URI. Raises ValueError with what is wrong."""
    if uri == "":
        raise ValueError("no path or URI; write a path, file:///path, memory:SIZE or null:SIZE")
    xl = _XL_PREFIX.match(uri)
    if xl:
        path = uri[xl.end() :]
        if xl[1] == "phy" and not path.startswith("/"):
            path = "/dev/" + path  # as xl has it: phy:vg/guest
        return _file(path)
    scheme = _scheme_of(uri)
    rest = uri[len(scheme) + 1 :]
    if scheme == "" or uri.startswith("/"):
        return _file(uri)
    if scheme == "file":
        if not rest.startswith("///"):
            raise ValueError("a file URI has three slashes before the path and no host: file:///srv/disk.img")
        return _file(unquote(rest[2:]))
    if scheme in _DEFAULT_SIZE:
        return {"scheme": scheme, "size": parse_size(rest) if rest else _DEFAULT_SIZE[scheme]}
    if scheme in _IMAGES:
        raise ValueError(
            f"{scheme} images are not served; qemu-img convert -O raw makes one that is, or leave it to QEMU (qdisk)"
        )
    raise ValueError(
        f"unknown scheme {scheme}:; there are: a path, file:///path, memory:SIZE, null:SIZE"
        " (a path with a colon is written with a / or ./ before it)"
    )


def _file(path: str) -> dict[str, Any]:
    if path == "":
        raise ValueError("the path is empty")
    if "\0" in path:
        raise ValueError("a path cannot have a zero byte in it")
    return {"scheme": "file", "path": os.path.abspath(path)}


def parse_disk(text: str) -> DiskSpec:
    """Read ``URI,key=value,...``. Raises ConfigError with the option, the value and what is allowed."""
    uri, *words = text.split(",")
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        option = OPTIONS.get(name)
        if option is None or not equals:
            known = ", ".join(OPTIONS)
            what = f"unknown option {name!r}" if equals else f"{word!r} is not of the form option=value"
            hint = "" if equals else "; a comma in a path is written %2C in a file:// URI"
            raise ConfigError(f"disk {text!r}: {what}; there are: {known}{hint}")
        if name in values:
            raise ConfigError(f"disk {text!r}: option {name} is given twice; keep one")
        try:
            values[name] = option.read(value)
        except (ValueError, KeyError):
            raise ConfigError(f"disk {text!r}: option {name}={value!r}: must be {option.allowed}") from None
    try:
        return _checked(DiskSpec(uri, **_target(uri), **_derived(values)))
    except ValueError as e:
        raise ConfigError(f"disk {text!r}: {e}") from None


def _derived(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on other options; contradictions. Raises ValueError."""
    out = dict(values)
    if out.get("cdrom"):
        if out.setdefault("mode", "r") != "r":
            raise ValueError(f"option mode={out['mode']}: a CD-ROM is read only; use mode=r")
    policy = out.get("policy", "persistent")
    if "persistent" in out and out["persistent"] != (policy == "persistent"):
        if "policy" in out or out["persistent"]:
            raise ValueError(
                f"options policy={policy} and persistent={_on_off(out['persistent'])} contradict each other"
            )
        out["policy"] = policy = "map"
    out["persistent"] = policy == "persistent"
    return out


def _checked(spec: DiskSpec) -> DiskSpec:
    if spec.scheme != "file":
        unit = spec.sector_size or SECTOR
        if spec.size == 0 or spec.size % unit:
            raise ValueError(f"size {spec.size}: must be a multiple of the sector size, {unit} bytes, and not zero")
    if spec.compat_4k and spec.sector_size == SECTOR:
        raise ValueError("option compat_4k=on means nothing with sector_size=512")
    return spec


def parse_xl(params: str, mode: str = "w", device_type: str = "disk", *, options: str = "") -> DiskSpec:
    """What a toolstack left in a backend's directory: `params`, `mode` and `device-type`. Raises ConfigError."""
    if mode not in _XL_MODES:
        raise ConfigError(f"disk {params!r}: mode {mode!r}: must be one of {', '.join(_XL_MODES)}")
    if device_type not in ("disk", "cdrom"):
        raise ConfigError(f"disk {params!r}: device-type {device_type!r}: must be disk or cdrom")
    # The toolstack's mode holds, whatever else is in the text; a CD-ROM is read only even if xl says w.
    uri, *words = params.split(",")
    if uri and not _scheme_of(uri) and not uri.startswith(("/", "./", "../")):
        uri = "/dev/" + uri  # as xl has it: vg/guest
    for word in words:
        if word.startswith("mode=") and word[5:] not in _XL_MODES:
            raise ConfigError(f"disk {params!r}: option {word!r}: must be one of {', '.join(_XL_MODES)}")
    words = [w for w in [*words, *options.split(",")] if w and not w.startswith("mode=")]
    cdrom = device_type == "cdrom"
    words.append("mode=" + ("r" if cdrom else _XL_MODES[mode]))
    if cdrom and not any(w.startswith("cdrom=") for w in words):
        words.append("cdrom=on")
    return parse_disk(",".join([uri, *words]))
