"""One process a device: claims by flock in the run directory.

RUN_DIR/claims/<backend domid>-<class>-<domid>-<devid>.lock holds the pid of whoever has it. The kernel drops
the lock when the process ends, however it ends, so a claim is never stale; the file stays and means nothing
by itself. A TAP is claimed likewise, by `tap:<network namespace>:<name>.lock`: see netback.outer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from .device import DeviceId
from .errors import DeviceBusyError, PlatformError


class Claims:
    """The devices of this process."""

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / "claims"
        self._held: dict[str, int] = {}

    def path(self, device: DeviceId) -> Path:
        """The lock file of a device."""
        return self.directory / f"{device.backend_domid}-{device}.lock"

    def take(self, device: DeviceId) -> None:
        """Claim a device. Raises DeviceBusyError naming pid and file if another process (or we) has it.

        PlatformError if the run directory has no place for the file.
        """
        path = self.path(device)
        if str(path) in self._held:
            raise DeviceBusyError(f"{device} is served by this process already ({path})")
        self._held[str(path)] = lock(
            path, str(device), f"{device} is served by", "stop that one, or split the guests with --domain"
        )

    def held(self, device: DeviceId) -> bool:
        """Whether a process has it, this one or another."""
        try:
            fd = os.open(self.path(device), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except OSError:
            return True
        finally:
            os.close(fd)

    def drop(self, device: DeviceId) -> None:
        """Give a claim back. Harmless if there is none.

        The file is left: removing it would let a third process lock a new one while a second waits for this.
        """
        fd = self._held.pop(str(self.path(device)), None)
        if fd is not None:
            os.ftruncate(fd, 0)
            os.close(fd)

    def close(self) -> None:
        """Give all claims back."""
        while self._held:
            _, fd = self._held.popitem()
            os.ftruncate(fd, 0)
            os.close(fd)


def lock(path: Path, what: str, who: str, hint: str) -> int:
    """Make a file and lock it: the descriptor, with which the lock goes. DeviceBusyError, of `who` another process,
    its pid and a `hint`, if that has it; PlatformError about `what` if the run directory has no place for the file."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise PlatformError(
            f"{what}: claim {path} cannot be made: {e.strerror}; the run directory has to be writable, with room"
        ) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise DeviceBusyError(f"{who} another process, pid {holder or 'unknown'} ({path}); {hint}") from e
    with contextlib.suppress(OSError):  # no room: the lock is what counts, the pid is for people
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd
