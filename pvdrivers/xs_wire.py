"""The xenstore wire protocol as values: header, message numbers, limits, error names. No I/O.

Source: xen/include/public/io/xs_wire.h (struct xsd_sockmsg, enum xsd_sockmsg_type, xsd_errors[]) and
docs/misc/xenstore.txt ("Communication with xenstore is via either sockets, or event channel and shared
memory"). A message is a header of four little-endian 32-bit words and up to PAYLOAD_MAX bytes of payload.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final, NamedTuple

XS_CONTROL: Final = 0
XS_DIRECTORY: Final = 1
XS_READ: Final = 2
XS_GET_PERMS: Final = 3
XS_WATCH: Final = 4
XS_UNWATCH: Final = 5
XS_TRANSACTION_START: Final = 6
XS_TRANSACTION_END: Final = 7
XS_INTRODUCE: Final = 8
XS_RELEASE: Final = 9
XS_GET_DOMAIN_PATH: Final = 10
XS_WRITE: Final = 11
XS_MKDIR: Final = 12
XS_RM: Final = 13
XS_SET_PERMS: Final = 14
XS_WATCH_EVENT: Final = 15
XS_ERROR: Final = 16
XS_IS_DOMAIN_INTRODUCED: Final = 17
XS_RESUME: Final = 18
XS_SET_TARGET: Final = 19
# 20 was XS_RESTRICT; it has been removed and its number is not used again.
XS_RESET_WATCHES: Final = 21
XS_DIRECTORY_PART: Final = 22
XS_TYPE_COUNT: Final = 23

TYPE_NAMES: Final[dict[int, str]] = {
    value: name[3:] for name, value in list(globals().items()) if name.startswith("XS_") and name != "XS_TYPE_COUNT"
}

PAYLOAD_MAX: Final = 4096  # XENSTORE_PAYLOAD_MAX, bytes after the header
ABS_PATH_MAX: Final = 3072  # XENSTORE_ABS_PATH_MAX, bytes without the NUL
REL_PATH_MAX: Final = 2048  # XENSTORE_REL_PATH_MAX, bytes without the NUL

HEADER: Final = struct.Struct("<IIII")  # type, req_id, tx_id, len
HEADER_SIZE: Final = HEADER.size

# xsd_errors[]: an error travels as its name, and only these have one. Order as in the header; the first
# is also what an error without a name is sent as.
ERROR_NAMES: Final[dict[int, bytes]] = {
    getattr(errno, name): name.encode()
    for name in (
        "EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO", "ENOTEMPTY",
        "ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM",
    )
}  # fmt: skip
ERROR_NUMBERS: Final[dict[bytes, int]] = {name: number for number, name in ERROR_NAMES.items()}

# What each means to the one who asked.
ERROR_ADVICE: Final[dict[int, str]] = {
    errno.EACCES: "this domain may not do that; see the node's permissions",
    errno.EPERM: "only dom0 may change the owner of a node",
    errno.ENOSPC: "a quota of this domain is used up (nodes, node size, permissions or transactions)",
    errno.E2BIG: "more than one message holds, or the watch quota of this domain is used up",
    errno.EAGAIN: "somebody else changed what the transaction used",
    errno.EINVAL: "xenstored does not accept the path or an argument",
    errno.EEXIST: "it is there already",
    errno.ENOSYS: "this xenstored does not know the operation",
}


class XenStoreError(OSError):
    """A refused request, a timeout or a lost connection.

    `errno` is the error (ETIMEDOUT: no reply in time; ECONNRESET: the connection is gone; EPROTO: the peer
    does not speak xenstore), `operation` the request as named in xenstore.txt, `path` what it was about (""
    if nothing). Like any OSError it can be caught as what it is: PermissionError for EACCES and EPERM,
    FileExistsError for EEXIST.
    """

    operation: str
    path: str

    def __new__(cls, number: int, operation: str, path: str = "", detail: str = "") -> XenStoreError:
        name = errno.errorcode.get(number, str(number))
        why = detail or ERROR_ADVICE.get(number, os.strerror(number))
        text = f"xenstore {operation}{' ' + path if path else ''}: {name}: {why}"
        error: XenStoreError = OSError.__new__(_BY_NUMBER.get(number, cls), number, text)
        error.operation, error.path = operation, path
        return error

    def __str__(self) -> str:
        return str(self.strerror)


class _Denied(XenStoreError, PermissionError):
    """EACCES, EPERM."""


class _Exists(XenStoreError, FileExistsError):
    """EEXIST."""


_BY_NUMBER: Final[dict[int, type[XenStoreError]]] = {
    errno.EACCES: _Denied,
    errno.EPERM: _Denied,
    errno.EEXIST: _Exists,
}


class Message(NamedTuple):
    """One message, either direction. `payload` is without the header, NULs included."""

    type: int
    req_id: int
    tx_id: int
    payload: bytes


class WireError(ValueError):
    """Bytes that no peer keeping to xs_wire.h would send; the stream cannot be followed any further."""


def pack(type_: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """Header and payload of one message. Raises WireError for a payload over PAYLOAD_MAX."""
    if len(payload) > PAYLOAD_MAX:
        raise WireError(f"payload of {len(payload)} bytes, the limit is {PAYLOAD_MAX}")
    return HEADER.pack(type_, req_id, tx_id, len(payload)) + payload


def unpack(buffer: bytes | bytearray, offset: int = 0) -> tuple[Message, int] | None:
    """The message at `offset` and the offset behind it, or None while it is incomplete.

    Raises WireError when the header announces more than PAYLOAD_MAX bytes.
    """
    if len(buffer) - offset < HEADER_SIZE:
        return None
    type_, req_id, tx_id, length = HEADER.unpack_from(buffer, offset)
    if length > PAYLOAD_MAX:
        raise WireError(f"header announces a payload of {length} bytes, the limit is {PAYLOAD_MAX}")
    end = offset + HEADER_SIZE + length
    if len(buffer) < end:
        return None
    return Message(type_, req_id, tx_id, bytes(buffer[offset + HEADER_SIZE : end])), end


def error_payload(number: int) -> bytes:
    """What XS_ERROR carries for an errno: its name and a NUL; EINVAL for one that has no name on the wire."""
    return ERROR_NAMES.get(number, b"EINVAL") + b"\0"


def error_number(payload: bytes) -> int:
    """The errno of an XS_ERROR payload; EINVAL for a name that xs_wire.h does not list."""
    return ERROR_NUMBERS.get(payload.rstrip(b"\0"), errno.EINVAL)


def join(*parts: bytes) -> bytes:
    """NUL-terminated strings, one behind the other."""
    return b"\0".join(parts) + b"\0"


def split(payload: bytes) -> list[bytes]:
    """The NUL-terminated strings of a payload; bytes behind the last NUL are ignored (as get_strings() does)."""
    return payload.split(b"\0")[:-1]
