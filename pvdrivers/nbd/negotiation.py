"""The fixed newstyle handshake: from the greeting to the export that the client wants."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from . import wire

__all__ = ["Disk", "Gone", "negotiate", "receive"]

_MOST_OPTIONS = 1000  # a client that asks for ever is not going to use a disk


class Gone(Exception):
    """The client has left, or says what no client may: this connection ends, others do not notice."""


class Disk(Protocol):
    """What is exported. All sizes are bytes."""

    @property
    def size(self) -> int: ...
    @property
    def block_size(self) -> int:
        """The least that can be read or written, and what offsets are multiples of."""

    @property
    def readonly(self) -> bool: ...
    @property
    def can_trim(self) -> bool: ...
    @property
    def description(self) -> str: ...

    def submit(self, op: str, offset: int = 0, length: int = 0, buffer: Any = None) -> Future[int]:
        """Start "read", "write", "flush" or "discard". The future ends with OSError if that fails.

        Raises OSError or ValueError at once for what cannot be done. Callbacks of the future are short.
        """


def receive(sock: socket.socket, n: int) -> bytes:
    """Exactly `n` bytes. Raises Gone."""
    data = bytearray(n)
    receive_into(sock, memoryview(data))
    return bytes(data)


def receive_into(sock: socket.socket, view: memoryview) -> None:
    """Exactly as much as fits. Raises Gone."""
    while view:
        try:
            n = sock.recv_into(view)
        except OSError as error:
            raise Gone(str(error)) from error
        if not n:
            raise Gone("the client closed the connection")
        view = view[n:]


def send(sock: socket.socket, data: bytes) -> None:
    """All of it. Raises Gone."""
    try:
        sock.sendall(data)
    except OSError as error:
        raise Gone(str(error)) from error


def flags_of(disk: Disk) -> int:
    """The transmission flags of an export."""
    flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.CAN_MULTI_CONN
    if disk.readonly:
        return flags | wire.READ_ONLY
    return flags | wire.SEND_FUA | wire.SEND_WRITE_ZEROES | (wire.SEND_TRIM if disk.can_trim else 0)


def negotiate(sock: socket.socket, exports: Mapping[str, Disk]) -> Disk | None:
    """The export that the client has chosen; None if it said good-bye. Raises Gone."""
    send(sock, wire.GREETING.pack(wire.NBDMAGIC, wire.IHAVEOPT, wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES))
    (client_flags,) = wire.CLIENT_FLAGS.unpack(receive(sock, wire.CLIENT_FLAGS.size))
    if client_flags & ~(wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES):
        raise Gone(f"client flags {client_flags:#x}")
    for _ in range(_MOST_OPTIONS):
        magic, option, length = wire.OPTION.unpack(receive(sock, wire.OPTION.size))
        if magic != wire.IHAVEOPT or length > wire.MAX_OPTION:
            raise Gone(f"option with magic {magic:#x} and {length} bytes")
        data = receive(sock, length)
        if option == wire.OPT_EXPORT_NAME:
            # The old way, which has no answer for a name that is not there.
            disk = _find(exports, data.decode(errors="replace"))
            if disk is None:
                raise Gone("no such export")
            padding = b"" if client_flags & wire.FLAG_NO_ZEROES else bytes(124)
            send(sock, wire.EXPORT_NAME_REPLY.pack(disk.size, flags_of(disk)) + padding)
            return disk
        if option == wire.OPT_ABORT:
            send(sock, wire.option_reply(option, wire.REP_ACK))
            return None
        disk = _answer(sock, exports, option, data)
        if disk is not None:
            return disk
    raise Gone(f"{_MOST_OPTIONS} options, and no end")


def _find(exports: Mapping[str, Disk], name: str) -> Disk | None:
    """An export by name; the empty name is the first."""
    return exports.get(name) if name else next(iter(exports.values()), None)


def _answer(sock: socket.socket, exports: Mapping[str, Disk], option: int, data: bytes) -> Disk | None:
    """Answer any option but the two that end the handshake by themselves; the disk after NBD_OPT_GO."""
    if option == wire.OPT_LIST:
        if data:
            send(sock, wire.option_reply(option, wire.REP_ERR_INVALID))
            return None
        for name, disk in exports.items():
            raw = name.encode()
            entry = struct.pack(">I", len(raw)) + raw + disk.description.encode()
            send(sock, wire.option_reply(option, wire.REP_SERVER, entry))
        send(sock, wire.option_reply(option, wire.REP_ACK))
        return None
    if option not in (wire.OPT_GO, wire.OPT_INFO):
        send(sock, wire.option_reply(option, wire.REP_ERR_UNSUP))
        return None
    parsed = wire.parse_go(data)
    if parsed is None:
        send(sock, wire.option_reply(option, wire.REP_ERR_INVALID))
        return None
    name, wanted = parsed
    found = _find(exports, name)
    if found is None:
        send(sock, wire.option_reply(option, wire.REP_ERR_UNKNOWN, b"no such export"))
        return None
    infos = [wire.info_export(found.size, flags_of(found))]
    # Sent even if it was not asked for: a client that does not care need not look.
    infos.append(wire.info_block_size(found.block_size, max(4096, found.block_size), wire.MAX_REQUEST))
    if wire.INFO_NAME in wanted:
        infos.append(struct.pack(">H", wire.INFO_NAME) + name.encode())
    if wire.INFO_DESCRIPTION in wanted:
        infos.append(struct.pack(">H", wire.INFO_DESCRIPTION) + found.description.encode())
    for info in infos:
        send(sock, wire.option_reply(option, wire.REP_INFO, info))
    send(sock, wire.option_reply(option, wire.REP_ACK))
    return found if option == wire.OPT_GO else None
