"""The unix socket of dom0's clients, and the certainty that it is ours alone.

The socket is bound under a temporary name and renamed into place, so that its name never leads to a socket
that is not yet listening and a stale file of a server that died is replaced. A lock file beside it says who
is alive.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

_log = logging.getLogger(__name__)
_SUN_PATH_MAX = 107  # bytes, without the NUL
_BACKLOG = 128


class XenStoreServerError(OSError):
    """The server cannot be set up as asked: the path is served by another, or cannot be a socket's."""


class Listener:
    """A listening socket at `path`, mode 0600: whoever may connect is dom0."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises XenStoreServerError(EADDRINUSE) when a live server is there."""
        self.path = Path(path)
        temporary = self.path.with_name(self.path.name + ".new")
        if len(os.fsencode(temporary)) > _SUN_PATH_MAX:
            raise XenStoreServerError(
                errno.ENAMETOOLONG, f"{path}: a unix socket's path has {_SUN_PATH_MAX - 4} bytes at most"
            )
        self._lock = self._take_lock(self.path.with_name(self.path.name + ".lock"))
        # Given up for a moment when descriptors have run out, so that a client can be turned away.
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._refuse_live_server()
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                temporary.unlink(missing_ok=True)
                self.sock.bind(os.fspath(temporary))
                os.chmod(temporary, 0o600)
                self.sock.listen(_BACKLOG)
                self.sock.setblocking(False)
                self._inode = os.stat(temporary).st_ino
                os.rename(temporary, self.path)
            except BaseException:
                self.sock.close()
                raise
        except BaseException:
            os.close(self._lock)
            os.close(self._spare)
            raise

    def _take_lock(self, name: Path) -> int:
        while True:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise XenStoreServerError(
                    errno.EADDRINUSE, f"{self.path}: served by another process; stop it, or use another path"
                ) from None
            try:
                if os.stat(name).st_ino == os.fstat(fd).st_ino:
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)  # its owner removed it between our open and our lock

    def _refuse_live_server(self) -> None:
        """One that does not know our lock, such as xenstored."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(os.fspath(self.path))
            except (FileNotFoundError, ConnectionRefusedError):
                return  # nobody, or a stale file
            except BlockingIOError:
                pass  # somebody, with a full backlog
        raise XenStoreServerError(
            errno.EADDRINUSE, f"{self.path}: another xenstored listens here; stop it, or use another path"
        )

    def accept(self) -> socket.socket | None:
        """The next client, None if there is none (or none that could be served)."""
        try:
            return self.sock.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as e:
            _log.error("xenstore: a client is turned away: %s", e)
            self._turn_away()
            return None

    def _turn_away(self) -> None:
        """Left in the backlog, the client would wake the loop again and again."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            self.sock.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass  # somebody else was faster; the next client tries again

    def close(self) -> None:
        """Stops listening and removes the file if it is still ours."""
        self.sock.close()
        try:
            if os.stat(self.path).st_ino == self._inode:
                self.path.unlink()
        except FileNotFoundError:
            pass
        self.path.with_name(self.path.name + ".lock").unlink(missing_ok=True)
        os.close(self._lock)
        if self._spare >= 0:
            os.close(self._spare)
