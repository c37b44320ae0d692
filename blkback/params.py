"""What a toolstack has written about a disk, read as Linux's backend would where that says the same.

    params                the disk: a path, or a URI with options (storage.uri); libxl writes "aio:PATH" for a qdisk
    script                who makes a block device of `params`; none is needed for what we open ourselves
    physical-device-path  what the script has made, and physical-device its number, "MAJOR:MINOR" in hexadecimal
    mode, device-type     r or w (w! is ours); disk or cdrom
    discard-enable        0 keeps discard from the guest
    removable             1 is told to the guest
    direct-io-safe        1: files on NFS and its like are read and written past the page cache, too, as all others are

libxl runs the script after our InitWait, so a disk whose script has not run yet is advertised without being opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

from pvdrivers.device import BackKeys
from pvdrivers.storage.uri import DiskSpec, parse_xl

_OURS_TO_OPEN = frozenset({"", "block", "true"})
"""Scripts that make nothing but what we open ourselves: libxl's own, for files and block devices; /bin/true."""


def disk_of(keys: BackKeys) -> DiskSpec | None:
    """The disk; None while its script has not made it. Raises ConfigError."""
    safe = keys.flag("direct-io-safe")
    mode, device_type = keys.str_key("mode", "w"), keys.str_key("device-type", "disk")
    params = keys.str_key("params", None, max_length=4096)
    if script_of(keys) in _OURS_TO_OPEN:
        return replace(parse_xl(params, mode, device_type), direct_io_safe=safe)
    made = keys.str_key("physical-device-path", "", max_length=4096) or _by_number(keys)
    return replace(parse_xl(made, mode, device_type), direct_io_safe=safe) if made else None


def awaits_block(keys: BackKeys) -> bool:
    """Whether libxl's script `block` has yet to make a loop device of a file. We need none, but the script fails where
    we are Connected before it has looked, and the toolstack takes the disk away."""
    made = keys.str_key("physical-device-path", "", max_length=4096) or keys.str_key("physical-device", "")
    if made or script_of(keys) != "block":
        return False
    return os.path.isfile(keys.str_key("params", None, max_length=4096))


def script_of(keys: BackKeys) -> str:
    """The name of the hotplug script, without its directory."""
    return keys.str_key("script", "", max_length=4096).rpartition("/")[2]


def _by_number(keys: BackKeys) -> str:
    number = keys.str_key("physical-device", "")
    if not number:
        return ""
    if not (match := re.fullmatch(r"([0-9a-f]{1,3}):([0-9a-f]{1,5})", number)):
        raise keys.wrong("physical-device", f"is {number!r}, not MAJOR:MINOR in hexadecimal")
    return f"/dev/block/{int(match[1], 16)}:{int(match[2], 16)}"
