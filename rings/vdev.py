"""Virtual device numbers: "xvda1" to the number that is a disk's name in xenstore, and back.

The encoding is that of Xen's docs/man/xen-vbd-interface.7:

    1 << 28 | disk << 8 | partition      xvd, what does not fit below
    202 << 8 | disk << 4 | partition     xvd, disks and partitions up to 15
    8 << 8 | disk << 4 | partition       sd, disks and partitions up to 15
    3 << 8 | disk << 6 | partition       hd, disks 0 and 1, partitions up to 63
    22 << 8 | (disk - 2) << 6 | part.    hd, disks 2 and 3
"""

from __future__ import annotations

import re

__all__ = ["vdev_name", "vdev_number"]

_NAME = re.compile(r"(xvd|sd|hd)([a-z]+)([0-9]{0,8})")
_DISK = re.compile(r"d([0-9]{1,8})(?:p([0-9]{1,8}))?")
_EXTENDED = 1 << 28
_MAX_DISK, _MAX_PARTITION = (1 << 20) - 1, 255


def _letters_to_disk(letters: str) -> int:
    """a is 0, z is 25, aa is 26."""
    disk = 0
    for c in letters:
        disk = disk * 26 + ord(c) - ord("a") + 1
    return disk - 1


def _disk_to_letters(disk: int) -> str:
    out, disk = "", disk + 1
    while disk:
        disk, digit = divmod(disk - 1, 26)
        out = chr(ord("a") + digit) + out
    return out


def vdev_number(name: str) -> int:
    """The number of "xvda", "xvda1", "sdb", "hdc3", "d5p2", or of a number in decimal or hexadecimal itself.

    Raises ValueError for what cannot be encoded.
    """
    bad = f"virtual device {name!r}"
    if match := _NAME.fullmatch(name):
        kind, disk, part = match[1], _letters_to_disk(match[2]), int(match[3] or 0)
    elif match := _DISK.fullmatch(name):
        kind, disk, part = "xvd", int(match[1]), int(match[2] or 0)
    else:
        try:
            number = int(name, 0)
        except ValueError:
            raise ValueError(f"{bad}: not like xvda, xvda1, sda, hda, d0p0 or a number") from None
        if not 0 <= number < 1 << 29:
            raise ValueError(f"{bad}: not from 0 to 0x1fffffff")
        return number
    if kind == "xvd":
        if disk <= 15 and part <= 15:
            return 202 << 8 | disk << 4 | part
        if disk <= _MAX_DISK and part <= _MAX_PARTITION:
            return _EXTENDED | disk << 8 | part
        raise ValueError(f"{bad}: disk at most {_MAX_DISK}, partition at most {_MAX_PARTITION}")
    if kind == "sd":
        if disk <= 15 and part <= 15:
            return 8 << 8 | disk << 4 | part
        raise ValueError(f"{bad}: sd has 16 disks of 15 partitions")
    if disk <= 3 and part <= 63:
        return (3 if disk < 2 else 22) << 8 | (disk & 1) << 6 | part
    raise ValueError(f"{bad}: hd has 4 disks of 63 partitions")


def vdev_name(number: int) -> str:
    """The name that a guest would give it; the number itself in decimal where there is none."""
    part: int
    if number >> 28 == 1:
        disk, part = (number >> 8) & _MAX_DISK, number & 0xFF
        prefix = "xvd"
    elif number >> 8 in (202, 8):
        disk, part = (number >> 4) & 15, number & 15
        prefix = "xvd" if number >> 8 == 202 else "sd"
    elif number >> 8 in (3, 22):
        disk, part = ((number >> 6) & 3) + (2 if number >> 8 == 22 else 0), number & 63
        if (number >> 6) & 3 > 1:
            return str(number)
        prefix = "hd"
    else:
        return str(number)
    return f"{prefix}{_disk_to_letters(disk)}{part or ''}"
