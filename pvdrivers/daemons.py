"""The daemons of a run directory: each has a record there, and holds a lock on it for as long as it lives.

RUN_DIR/daemons/PID.json says who it is, PID.devices.json what became of its devices (pvdrivers.report), and PID.sock is
where it listens (pvdrivers.upgrade). What a killed daemon has left is not locked, and is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .errors import PlatformError


@dataclass(frozen=True)
class Daemon:
    """A process that serves devices."""

    pid: int
    version: str
    command: list[str]
    """Its command line, with which a successor is started."""
    started: float
    """Seconds since the epoch."""


class Record:
    """The record of this process, for as long as it lives."""

    def __init__(self, run_dir: Path, command: Sequence[str] = ()) -> None:
        """Raises PlatformError if there is no place for it."""
        self.directory = run_dir / "daemons"
        self.daemon = Daemon(os.getpid(), __version__, list(command or sys.orig_argv), time.time())
        self.path = self.directory / f"{os.getpid()}.json"
        new = self.path.with_suffix(".new")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_stale(self.directory)
            self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)  # before anybody sees it
            os.write(self._fd, json.dumps(asdict(self.daemon)).encode())
            os.rename(new, self.path)
        except OSError as e:
            hint = "the run directory has to be writable, with room"
            raise PlatformError(f"{self.path}: cannot be made: {e.strerror}; {hint}") from e

    def file(self, suffix: str) -> Path:
        """Another file of this process, which goes when it does: PID.suffix."""
        return self.directory / f"{self.daemon.pid}.{suffix}"

    def remove(self) -> None:
        """The process ends in order."""
        for path in _files(self.directory, self.daemon.pid):
            path.unlink(missing_ok=True)
        os.close(self._fd)


def running(run_dir: Path) -> list[Daemon]:
    """The daemons that live, oldest first."""
    found = []
    for path in (run_dir / "daemons").glob("*.json"):
        if path.stem.isdigit() and _locked(path):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(Daemon(**json.loads(path.read_bytes())))
    return sorted(found, key=lambda daemon: daemon.started)


def read(run_dir: Path, daemon: Daemon, suffix: str) -> Any:
    """What a daemon's file PID.suffix says in JSON; None if there is no such file."""
    try:
        return json.loads((run_dir / "daemons" / f"{daemon.pid}.{suffix}").read_bytes())
    except (OSError, ValueError):
        return None


def listen(path: Path) -> socket.socket:
    """A socket of whole messages at `path`, for this user alone. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        with _short(path) as name:
            sock.bind(name)
        sock.listen(4)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: Path) -> socket.socket:
    """A connection to it. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with _short(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of `path` that is no longer than the address of a socket may be."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _files(directory: Path, pid: int) -> list[Path]:
    return list(directory.glob(f"{pid}.*"))


def _remove_stale(directory: Path) -> None:
    for path in directory.glob("*.json"):
        if path.stem.isdigit() and not _locked(path):
            for file in _files(directory, int(path.stem)):
                file.unlink(missing_ok=True)
