"""The client's end of the hypercall socket."""

from __future__ import annotations

import array
import errno
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from pvdrivers.errors import PlatformError

from . import wire

_NAMES = {
    number: name
    for name, number in vars(wire).items()
    if name in ("HELLO", "CREATE_DOMAIN", "DESTROY_DOMAIN", "LIST_DOMAINS", "DOMAIN_INFO", "FOREIGN")
    or name.startswith(("CLAIM_", "EVTCHN_"))
}
_ADVICE = {
    (wire.HELLO, errno.ESRCH): "there is no such domain; it was destroyed, or its last process ended",
    (wire.HELLO, errno.EACCES): "the token is not the one that create_domain gave",
    (wire.HELLO, errno.EPROTONOSUPPORT): "that program and this one are of different versions",
    (wire.CREATE_DOMAIN, errno.ENOMEM):
        "there is not so much memory; give it less, destroy another, or raise --memory of `pvdrivers sim`",
    (wire.FOREIGN, errno.ESRCH): "there is no such domain",
    (wire.FOREIGN, errno.EACCES): "it has granted this domain nothing",
    (wire.EVTCHN_ALLOC_UNBOUND, errno.ENOSPC): "all event channel ports are in use; the FIFO ABI has more",
    (wire.EVTCHN_BIND_INTERDOMAIN, errno.ENOSPC): "all event channel ports are in use; the FIFO ABI has more",
    (wire.EVTCHN_BIND_INTERDOMAIN, errno.EINVAL): "that port does not wait for this domain, or is bound already",
    (wire.EVTCHN_FDS, errno.EMFILE): "the embedded Xen is out of descriptors; raise its `ulimit -n`",
}  # fmt: skip
_GONE = "the embedded Xen is gone, or has ended this domain"


class HypercallError(PlatformError):
    """The embedded Xen refused. `errno` is why."""

    def __init__(self, number: int, what: str, why: str) -> None:
        super().__init__(f"{what}: {errno.errorcode.get(number, number)}: {why}")
        self.errno = number


@dataclass
class Reply:
    """The answer to one hypercall; whoever takes it owns the descriptors."""

    values: list[int]
    tail: bytes
    fds: list[int]


class Hypercalls:
    """One connection to the hypervisor: a handle of a domain. Safe to share between threads."""

    def __init__(self, run_dir: Path, domid: int, token: bytes | None, *, flags: int = 0,
                 limit: int = wire.PORTS_2L) -> None:  # fmt: skip
        """Join as `domid`. `flags` are WANT_*; the descriptors they ask for are in `hello`. Raises PlatformError."""
        path = run_dir / wire.SOCKET
        self._lock = threading.Lock()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._sock.connect(os.fspath(path))
        except OSError as e:
            self._sock.close()
            raise HypercallError(
                e.errno or errno.EINVAL, f"embedded Xen at {run_dir}",
                f"{e.strerror or e}; start it with: pvdrivers sim --run-dir {run_dir}",
            ) from e  # fmt: skip
        self.domid = domid
        try:
            self.hello = self.call(wire.HELLO, wire.VERSION, domid, flags, limit, tail=token or b"")
        except BaseException:
            self._sock.close()
            raise
        self.handle, self.pages, self.grants, self.limit = self.hello.values[:4]

    def call(self, op: int, *args: int, tail: bytes = b"") -> Reply:
        """One hypercall. Raises HypercallError with the errno of the answer; ECONNRESET when Xen is gone."""
        what = f"{_NAMES.get(op, op)}({', '.join(map(str, args))})"
        try:
            request = wire.REQUEST.pack(op, *args, *[0] * (7 - len(args))) + tail
        except Exception as e:
            raise HypercallError(errno.EINVAL, what, "an argument does not fit into 32 bits") from e
        with self._lock:
            message, fds = self._exchange(request, what)
        status, *values = wire.REPLY.unpack_from(message)
        if status:
            for fd in fds:
                os.close(fd)
            raise HypercallError(-status, what, _ADVICE.get((op, -status), os.strerror(-status)))
        return Reply(values, message[wire.REPLY.size :], fds)

    def _exchange(self, request: bytes, what: str) -> tuple[bytes, list[int]]:
        fds = array.array("i")
        try:
            self._sock.sendall(request)
            message, ancillary, _, _ = self._sock.recvmsg(
                wire.LARGEST_REPLY, socket.CMSG_SPACE(wire.MOST_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as e:
            raise HypercallError(errno.ECONNRESET, what, f"{_GONE} ({e.strerror or e})") from e
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if len(message) < wire.REPLY.size:
            for fd in fds:
                os.close(fd)
            raise HypercallError(errno.ECONNRESET, what, _GONE)
        return message, list(fds)

    def close(self) -> None:
        """Leave: ports and pins of this handle are gone. Harmless a second time."""
        self._sock.close()
