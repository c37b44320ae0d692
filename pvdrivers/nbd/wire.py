"""The NBD protocol's messages: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. Pure."""

from __future__ import annotations

import errno
import struct

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

# Handshake flags, of the server and of the client
FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
REP_ACK, REP_SERVER, REP_INFO = 1, 2, 3
REP_ERR_UNSUP = 1 << 31 | 1
REP_ERR_INVALID = 1 << 31 | 3
REP_ERR_UNKNOWN = 1 << 31 | 6
REP_ERR_TOO_BIG = 1 << 31 | 9
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

# Transmission flags
HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
CAN_MULTI_CONN = 1 << 8

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES = range(7)
CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
EXPORT_NAME_REPLY = struct.Struct(">QH")  # size, flags; then 124 zeroes unless both sides do without
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")

MAX_OPTION = 16384
"""Bytes of an option's data: names are 4096 at most, and few options have more than a name."""
MAX_REQUEST = 32 << 20
"""Bytes that one read or write moves at most, as qemu-nbd and nbdkit have it."""

# The errors that the protocol knows; anything else is EIO.
_ERRORS = {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ESHUTDOWN}
EOPNOTSUPP = 95


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """The head of a reply; `error` is an errno, or 0."""
    if error == errno.EROFS:
        error = errno.EPERM
    elif error == EOPNOTSUPP:
        error = errno.EINVAL  # the protocol has 95 for structured replies only
    elif error and error not in _ERRORS:
        error = errno.EIO
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def info_export(size: int, flags: int) -> bytes:
    """The payload of NBD_INFO_EXPORT."""
    return _INFO_EXPORT.pack(INFO_EXPORT, size, flags)


def info_block_size(least: int, preferred: int, most: int) -> bytes:
    """The payload of NBD_INFO_BLOCK_SIZE."""
    return _INFO_BLOCK_SIZE.pack(INFO_BLOCK_SIZE, least, preferred, most)


def parse_go(data: bytes) -> tuple[str, list[int]] | None:
    """(export name, information asked for) of an NBD_OPT_INFO or NBD_OPT_GO; None if it makes no sense."""
    if len(data) < 6:
        return None
    (length,) = struct.unpack_from(">I", data)
    if length > len(data) - 6:
        return None
    (count,) = struct.unpack_from(">H", data, 4 + length)
    if len(data) != 6 + length + 2 * count:
        return None
    wanted = struct.unpack_from(f">{count}H", data, 6 + length)
    return data[4 : 4 + length].decode(errors="replace"), list(wanted)
