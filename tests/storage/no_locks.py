"""File systems that have no locks, such as NFS without lockd: calls that would lock a disk fail as they do there.

No file system that can be mounted everywhere is like that. All else is real: the files, the I/O, and the one file that
is left its locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pvdrivers.storage import locks

__all__ = ["take_away"]


def take_away(but: str | os.PathLike[str]) -> SimpleNamespace:
    """Have the locks of stores fail in this process, on all files but one. Returns what stands in for `fcntl`."""

    def refuse(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)") != str(Path(but).resolve()):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def flock(fd: int, operation: int) -> None:
        refuse(fd)
        fcntl.flock(fd, operation)

    def control(fd: int, command: int, argument: Any = 0) -> Any:
        if command in (locks.F_OFD_GETLK, locks.F_OFD_SETLK):
            refuse(fd)
        return fcntl.fcntl(fd, command, argument)

    there = SimpleNamespace(**{**vars(fcntl), "flock": flock, "fcntl": control})
    locks.fcntl = there  # type: ignore[attr-defined]
    return there
